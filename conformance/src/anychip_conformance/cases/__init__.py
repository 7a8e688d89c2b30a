"""The suite's cases, collected by `pytest --pyargs anychip_conformance.cases --device NAME`."""
