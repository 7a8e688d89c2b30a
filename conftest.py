"""What every test shares."""

from hypothesis import settings

# A time is no part of a verdict: the machine may be busy.
settings.register_profile("anychip", deadline=None)
settings.load_profile("anychip")
