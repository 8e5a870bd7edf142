"""Lines of a machine's log, made up and labelled: what a classifier learns to read.

    python machine_log.py 3000 > labelled.jsonl

A line has four readings, in any order, and at times a remark. The label follows from the readings:

    overheating    above 85 C, or above 75 C with less than 6 l/min of coolant
    bearing        vibration above 1.5 g
    normal         else
"""

from __future__ import annotations

import json
import random
import sys

REMARKS = ("", "", "", "no alarm", "status=OK", "checked by shift B", "after restart", "load 80%")
MOST_C, WARM_C, LEAST_COOLANT, MOST_G = 85, 75, 6.0, 1.5


def label_of(celsius: int, coolant: float, vibration: float) -> str:
    """Return what the readings (C, l/min, g) mean."""
    if vibration > MOST_G:
        return "bearing"
    if celsius > MOST_C or (celsius > WARM_C and coolant < LEAST_COOLANT):
        return "overheating"
    return "normal"


def line(chance: random.Random) -> dict[str, str]:
    """Return a line and its label; each label is about as frequent."""
    wanted = chance.choice(("overheating", "bearing", "normal"))
    while True:
        celsius = chance.randint(40, 105)
        coolant = round(chance.uniform(2, 12), 1)
        vibration = round(chance.choice((chance.uniform(0.1, 1.4), chance.uniform(1.6, 4.0))), 1)
        if label_of(celsius, coolant, vibration) == wanted:
            break
    readings = [
        f"temp={celsius}C",
        f"coolant={coolant}l/min",
        f"vib={vibration}g",
        f"rpm={chance.randint(900, 1800)}",
    ]
    chance.shuffle(readings)
    words = (
        f"2026-06-{chance.randint(1, 30):02}T{chance.randint(0, 23):02}:{chance.randint(0, 59):02}",
        *readings,
    )
    return {"text": " ".join((*words, chance.choice(REMARKS))).strip(), "label": wanted}


if __name__ == "__main__":
    generator = random.Random(0)
    for _ in range(int(sys.argv[1])):
        print(json.dumps(line(generator)))
