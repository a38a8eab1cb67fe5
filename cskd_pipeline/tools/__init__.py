"""Tools that stand on the two stages; only the command line uses them.

``bench`` measures; ``estimate_dump`` and ``estimate_train`` forecast what a dump or a run costs;
``verify_cache`` checks a cache against images and teacher; ``report`` writes pages and plots;
``export_student`` writes students for others, with a ``model_card``, and ``publish`` what lies
beside a published cache, both with READMEs of ``markdown``; ``make_shards`` packs images; ``demo``,
on ``demo_images``, and ``study`` run the whole by this program's own ``commands``. All return
reports, which ``tables`` turns into text, or raise a CskdError, which says what to do.
"""
