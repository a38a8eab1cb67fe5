"""The study: a teacher, its cache, students with every method and seed, and forks late in a run.

1. **arms** -- the arms compared, the epoch at which a run is forked, and the paper's claims.
2. **ledger** -- the study's recipes and its finished parts: a study that was stopped resumes from
   them, and one with other recipes or data is refused.
3. **analysis** -- the teacher's local accuracy, and a student's attention distance.
4. **verdicts** -- means, deviations, paired differences, and whether a claim held. Numbers only.
5. **run_study** -- the commands, in order.
6. **report** -- tables, verdicts and plot.
"""
