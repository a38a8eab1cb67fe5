"""Services that any long job needs, whatever it computes.

1. ``atomic`` -- writes that happen whole or not at all; ``signals`` -- stopping where the work can
   be taken up again.
2. ``device`` -- devices, precision, memory; ``distributed`` -- the ranks of one job, as torchrun
   starts them; ``watch`` -- each rank shows the others that it lives, and why it failed;
   ``processes`` -- whose something is, and whether that process is still there.
3. ``console`` -- results, tables and messages; ``progress`` -- how far the work is.
4. ``schemas`` -- JSON documents, read within bounds and checked; ``resources`` -- where recipes and
   schemas lie; ``classes`` -- lists of class names compared.
"""
