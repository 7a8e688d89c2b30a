"""anychip's plugin for Acme devices. This module announces the platform and imports nothing heavy."""

from anychip.plugin_api import PlatformManifest, hookimpl

MANIFEST = PlatformManifest(
    name="acme",
    package="anychip-acme",
    api_version="0.2",  # what this was written against: raise it by hand
    summary="Acme devices",
    probe="anychip_acme.probe:probe",
    platform="anychip_acme.platform:AcmePlatform",
    seam="torch",
)


@hookimpl
def anychip_platforms():
    return [MANIFEST]
