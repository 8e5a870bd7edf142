"""Flower's SuperNode, in a process of its own that goes when the command goes.

python -m slm_export.federated.supernode '{"server", "ca", "key", "parent"}'
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from slm_export.federated.flower import end_with_parent


def take_part(request: dict[str, Any]) -> None:
    """Take messages from the server until the process is ended.

    Given   request: server: host:port; ca: path of the certificate that is believed; key: path of the private key
    """
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import NodeStateFactory
    from flwr.supernode.start_client_internal import start_client_internal

    key: Any = load_ssh_private_key(Path(request["key"]).read_bytes(), None)
    state = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    start_client_internal(
        state_factory=state,
        server_address=request["server"],
        node_config={},
        root_certificates=Path(request["ca"]).read_bytes(),
        insecure=False,
        authentication_keys=(key, key.public_key()),
        runtime_api_address=f"127.0.0.1:{_serve(state)}",
        runtime_dependency_install=False,
    )


def _serve(state: Any) -> int:
    """Answer this machine's apps at a port that is free, and return it."""
    import uvicorn
    from flwr.supernode.main import create_app

    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(state_factory=state), access_log=False, log_config=None, workers=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.05)
    return int(listening.getsockname()[1])


if __name__ == "__main__":
    end_with_parent()
    take_part(json.loads(sys.argv[1]))
