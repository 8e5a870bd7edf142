"""How fast an artifact is somewhere: on this machine (``host``), or on a device through a vendor's runner.

workload.py    what is asked: prompts, depths, runs, threads
figures.py     what was found: medians with their spread
subject.py     what is measured: an artifact of a bundle, or a file that another tool made
engines/       the runtimes of this machine, each an `Engine`
host.py        several subjects side by side, each in a process of its own
place.py       what a device is asked for; adb.py, ssh.py and devicectl.py reach one
runners.py     the vendors' programs: how they are called, and what they print
remote.py      find, check, push, run, pull, clean up
fleet.py       several devices at once
show.py        the table; show_fleet.py: that of several devices
"""
