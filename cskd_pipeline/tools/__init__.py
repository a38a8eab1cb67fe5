"""Tools built on the two stages; only the command line uses them.

``bench`` measures; ``estimate_dump`` and ``estimate_train`` forecast the cost of a dump or a run;
``verify_cache`` checks a cache against images and teacher; ``report`` writes pages and plots;
``export_student`` writes students for use elsewhere, with a ``model_card``, and ``publish`` the
files that accompany a published cache, both with READMEs from ``markdown``; ``make_shards`` packs
images; ``demo``, on ``demo_images``, and ``study`` run the whole pipeline through ``commands``. All
return reports, which ``tables`` turns into text, or raise a CskdError, which says what to do.
"""
