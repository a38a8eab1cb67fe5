"""The study: a teacher, its cache, students with every method over seeds, and forks late in a run.

1. **arms** -- what is compared, where a run is forked, and what the paper claims of it.
2. **ledger** -- the study's recipes and what its folder says is finished; a study that was stopped
   goes on from there, and one with other recipes or data is refused.
3. **analysis** -- the teacher's local accuracy, and how far a student's patches look.
4. **verdicts** -- means, deviations, paired differences, and whether a claim held. Plain numbers.
5. **run_study** -- the commands, in their order.
6. **report** -- tables, verdicts and plot.
"""
