"""Delegates: small standing jobs of a bundled model, each with a trigger, a place to run and a place for its answer.

config.py    delegates.toml, strict; triggers.py: what sets a delegate off
state.py     what was triggered and what came of it, in SQLite: nothing is lost, nothing is done twice
schedule.py  when a schedule is due, also after a standstill or a change of the clock
sources.py   clock, files and lines, looked at and recorded; files.py: which files changed; webhook.py: requests
local.py     a bundle's answer; remote.py: an endpoint's; routing.py: which of them
nearest.py   the nearest of known texts, for embedding models
screening.py  personal data in what could leave
outputs.py   where an answer goes
job.py       one trigger from its record to its delivery
runner.py    all delegates of a file until a signal, or once
"""
