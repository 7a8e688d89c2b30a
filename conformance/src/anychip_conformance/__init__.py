"""The conformance suite of anychip plugins, and the simulated platforms that keep the interface honest."""
