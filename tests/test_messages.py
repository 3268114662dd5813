from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shpool.engines.messages import NO_KEY, Kind, Landing, Message, MessageBuffer, encode, encode_pieces
from shpool.pickling import LARGE, dump_in_pieces, load

messages = st.lists(
    st.builds(
        Message,
        st.sampled_from(list(Kind)),
        st.integers(0, 2**64 - 1),
        st.binary(min_size=16, max_size=16),
        st.floats(0, 1e6),
        st.binary(max_size=300),
    ),
    max_size=6,
)


def encoded(message: Message) -> bytes:
    kind, number, key, seconds, payload = message
    return encode(Kind(kind), number, bytes(payload), key=key, seconds=seconds)


@given(messages=messages, data=st.data())
def test_messages_survive_any_cutting_of_the_stream(messages: list[Message], data: st.DataObject) -> None:
    stream = b"".join(encoded(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    buffer = MessageBuffer()
    read: list[Message] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        read.extend(buffer.feed(stream[start:end]))
    assert read == messages


def test_byte_by_byte_gives_the_same_messages() -> None:
    buffer = MessageBuffer()
    stream = encode(Kind.RESULT, 1, b"abc", seconds=0.5) + encode(Kind.STOP)
    read = [message for index in range(len(stream)) for message in buffer.feed(stream[index : index + 1])]
    assert read == [Message(Kind.RESULT, 1, NO_KEY, 0.5, b"abc"), Message(Kind.STOP, 0, NO_KEY, 0.0, b"")]


def test_an_unfinished_message_is_kept_back() -> None:
    buffer = MessageBuffer()
    assert list(buffer.feed(encode(Kind.RESULT, 1, b"abc")[:-1])) == []
    assert [message.payload for message in buffer.feed(b"c")] == [b"abc"]


def test_a_payload_in_pieces_arrives_whole() -> None:
    value: tuple[list[object], dict[int, bytes]] = ([b"x" * LARGE, bytearray(2 * LARGE)], {})
    [message] = MessageBuffer().feed(b"".join(encode_pieces(Kind.RESULT, 7, dump_in_pieces(value), seconds=0.5)))
    assert (message.kind, message.number, message.seconds, load(message.payload)) == (Kind.RESULT, 7, 0.5, value)


def large(fill: bytes, size: int = 2 * LARGE) -> bytes:
    return encode(Kind.RESULT, 1, fill * size)


def arrive(buffer: MessageBuffer, stream: bytes) -> memoryview:
    """Return the payload of a large message, which is one that comes in more than one piece."""
    assert buffer.feed(stream[:100]) == []
    [message] = buffer.feed(stream[100:])
    assert isinstance(message.payload, memoryview)
    return message.payload


def test_the_memory_of_a_large_payload_is_used_again_once_it_is_free() -> None:
    landing = Landing()
    buffer = MessageBuffer(landing)
    first = arrive(buffer, large(b"a"))
    second = arrive(buffer, large(b"b"))
    assert (bytes(first), bytes(second)) == (b"a" * 2 * LARGE, b"b" * 2 * LARGE)
    block = first.obj
    landing.free(first)
    third = arrive(buffer, large(b"c", LARGE))
    assert third.obj is block
    assert (bytes(second), bytes(third)) == (b"b" * 2 * LARGE, b"c" * LARGE)


def test_little_memory_waits_for_the_next_payload() -> None:
    landing = Landing()
    for size in (LARGE, 3 * 2**20, 3 * 2**20, 5 * 2**20, 9 * 2**20):
        landing.free(landing.room_for(size))
    assert sum(map(len, landing._free)) <= 8 * 2**20
    assert len(landing.room_for(10)) == 10
