"""A network switch whose frames take their time: ``python tests/switch.py SECONDS PORT...``, in the ports' namespace.

It stands in for the kernel's netem, which not every kernel has. Frames go where their address was last seen to come
from, or everywhere; what a port cannot take is dropped, as switches do.
"""

import select
import socket
import sys
import time
from collections import deque

EVERY_PROTOCOL = 3  # ETH_P_ALL
PACKET, VNET_HEADER, IGNORE_OUTGOING = 263, 15, 23  # SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING
HEADER = 10
"""Bytes before each frame that tell what is left to do to it: the kernel hands on many segments in one piece."""
ROOM = 8_000_000


def port(name: str) -> socket.socket:
    """What arrives at an interface, and the way out of it."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL))
    made.setsockopt(PACKET, VNET_HEADER, 1)
    made.setsockopt(PACKET, IGNORE_OUTGOING, 1)
    for forced, plain in ((33, socket.SO_RCVBUF), (32, socket.SO_SNDBUF)):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE
        try:
            made.setsockopt(socket.SOL_SOCKET, forced, ROOM)
        except PermissionError:
            made.setsockopt(socket.SOL_SOCKET, plain, ROOM)
    made.bind((name, 0))
    made.setblocking(False)
    return made


def serve(delay: float, names: list[str]) -> None:
    """Pass frames on, each ``delay`` seconds after it came; without end."""
    ports = [port(name) for name in names]
    known: dict[bytes, socket.socket] = {}
    waiting: deque[tuple[float, bytes, socket.socket]] = deque()
    print(flush=True)  # ready
    while True:
        ready, _, _ = select.select(ports, [], [], max(0.0, waiting[0][0] - time.monotonic()) if waiting else None)
        now = time.monotonic()
        for source in ready:
            frame = source.recv(HEADER + 70_000)
            known[frame[HEADER + 6 : HEADER + 12]] = source
            waiting.append((now + delay, frame, source))
        while waiting and waiting[0][0] <= now:
            _, frame, source = waiting.popleft()
            to = known.get(frame[HEADER : HEADER + 6])
            for target in [to] if to else [other for other in ports if other is not source]:
                try:
                    target.send(frame)
                except (BlockingIOError, OSError):
                    continue  # its queue is full


if __name__ == "__main__":
    serve(float(sys.argv[1]), sys.argv[2:])
