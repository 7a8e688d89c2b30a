"""What every test shares."""

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

# A time is no part of a verdict: the machine may be busy.
settings.register_profile("anychip", deadline=None)
settings.load_profile("anychip")

# What engines keep for later starts is not kept in the user's own cache, and not beyond the run.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="anychip-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
