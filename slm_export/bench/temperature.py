"""How hot this machine's processor is, where the system says so."""

from __future__ import annotations


def host_temperature() -> float | None:
    """Return the hottest sensor in degrees Celsius; None where the system tells of none."""
    import psutil

    if not hasattr(psutil, "sensors_temperatures"):
        return None
    found = [
        float(sensor.current) for sensors in psutil.sensors_temperatures().values() for sensor in sensors
    ]
    return max(found, default=None)
