"""The study: a teacher, its cache, and a student with every method and CKF schedule, over seeds.

1. **arms** -- what is compared, and what the paper claims of it.
2. **ledger** -- the study's recipes and what its folder says is finished; a study that was stopped
   goes on from there, and one with other recipes or data is refused.
3. **verdicts** -- means, deviations, paired differences, and whether a claim held. Plain numbers.
4. **run_study** -- the commands, in their order.
5. **report** -- table, verdicts and plot.
"""
