"""Low-rank adapters that stay apart from their base, and are switched while it runs (docs/adapters.md).

    low_rank    a folder that peft saved -> the factors of every matrix it adds to
    reference   the models that an artifact with an adapter on is compared with
    gate        that comparison, and switching
    build       the adapters of an export: written, judged
    verify      the adapters of a finished bundle, judged again
    manage      the adapters of a finished bundle: added, removed
    formats     which formats and recipes can have them

The words for them, `Factors` and the sessions and exporters that know them, are in `runtime`.
"""
