"""StreamBP: exact backpropagation through a block, and through the head, a chunk of the sequence at a time."""

from headway.memory.streambp.stream import StreamedBlock, stream_backward

__all__ = ["StreamedBlock", "stream_backward"]
