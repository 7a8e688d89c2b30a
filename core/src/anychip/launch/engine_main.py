"""The engine process: builds the engine, serves the API process, says what it died of."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec

from anychip.engine.engine_core import EngineCore
from anychip.engine.engine_loop import EngineLoop
from anychip.environment import Environment
from anychip.errors import AnychipError
from anychip.launch.build import build_engine, progress_of
from anychip.launch.child import end_with_parent, read_spec, show_stacks_when_asked
from anychip.model_config import load_model_config
from anychip.observability.logs import configure_logging
from anychip.process_specs import EngineSpec
from anychip.registry.blame import blamed
from anychip.registry.plugins import load_plugins

log = logging.getLogger("anychip.engine")


def main(spec: EngineSpec) -> int:
    """The exit status."""
    folder = Path(spec.folder)
    progress = progress_of(spec.config)
    loop = EngineLoop(folder, progress)
    core: EngineCore | None = None
    try:
        core = build_engine(spec.config, load_model_config(spec.config.model), load_plugins(), folder, progress)
        loop.run(core)
    except AnychipError as error:  # expected kinds: the API process prints them, without a trace
        loop.fail(error)
        return 1
    except Exception as error:
        log.exception("the engine stopped")
        loop.fail(blamed(error) or error)
        return 1
    finally:
        if core is not None:
            core.close("engine process ends")
        loop.close()
    return 0


if __name__ == "__main__":
    show_stacks_when_asked()
    configure_logging(Environment.read(child=True))
    engine_spec = msgspec.json.decode(read_spec(), type=EngineSpec)
    end_with_parent(engine_spec.folder)
    sys.exit(main(engine_spec))
