from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shpool.engines.messages import NO_KEY, Kind, Message, MessageBuffer, encode

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
