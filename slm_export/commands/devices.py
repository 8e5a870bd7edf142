"""What ``slm-export devices`` does. Imports no torch: a list of files is shown at once."""

from __future__ import annotations

from slm_export.commands.terminal import print_json, stdout
from slm_export.profile import load_profile, shipped_profiles
from slm_export.profile_view import print_profile, print_profiles


def devices_command(name: str | None, as_json: bool) -> None:
    """List the profiles, or show one."""
    profiles = (load_profile(name),) if name else shipped_profiles()
    if as_json:
        shown = [profile.model_dump(mode="json", by_alias=True, exclude_none=True) for profile in profiles]
        print_json(shown[0] if name else shown)
    elif name:
        print_profile(stdout(), profiles[0])
    else:
        print_profiles(stdout(), profiles)
