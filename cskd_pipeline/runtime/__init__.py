"""Services for any long job, whatever it computes.

1. ``atomic`` -- atomic writes; ``signals`` -- stopping where the work can be resumed.
2. ``device`` -- devices, precision, memory; ``distributed`` -- the ranks of a torchrun job;
   ``watch`` -- heartbeats of the ranks, and the reason why one failed; ``processes`` -- identity of
   processes, and whether they still run.
3. ``console`` -- results, tables and messages; ``progress`` -- progress of the work.
4. ``schemas`` -- JSON documents, read within limits and validated; ``resources`` -- folders of
   recipes and schemas; ``classes`` -- comparison of class names.
"""
