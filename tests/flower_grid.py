"""A Flower grid of this process, and the settings of its runs; for tests that have Flower."""

from flwr.app import Context, RecordDict
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message as unavailable
from helpers import SMALL_RUN

from fedmitr.flower_app import client_app

GIVEN = SMALL_RUN | {"partition.clients": 3, "partition.alpha": 1.0}
SET = " ".join(f"{name}={value}".replace(" ", "") for name, value in GIVEN.items())


class Loopback:
    """A grid whose nodes are functions of this process: node k runs the client app with its node config.

    silent: nodes that never reply; lost: nodes for which Flower replies; spoil(node, reply) may change a
    reply; reverse: the last reply comes first.
    """

    def __init__(self, configs, silent=(), lost=(), spoil=None, reverse=False):
        self.configs, self.silent, self.lost = configs, silent, lost
        self.spoil, self.reverse = spoil, reverse
        self.sent, self.replies = [], []

    def get_node_ids(self):
        return list(self.configs)

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            self.sent.append(message)
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"to {node}"  # as Flower's own grids do
            if node in self.silent:
                continue
            if node in self.lost:
                self.replies.append(unavailable(message.metadata, "node_unavail"))
                continue
            reply = client_app(message, Context(1, node, self.configs[node], RecordDict(), {}))
            self.replies.append(self.spoil(node, reply) if self.spoil else reply)
        return self.replies[::-1] if self.reverse else self.replies
