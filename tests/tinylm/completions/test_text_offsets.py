"""text_offset of the completions API: the character at which each token begins, for any bytes."""

from hypothesis import example, given
from hypothesis import strategies as st

from tinylm.completions.choice import TextOffsets


def character_of_each_byte(data: bytes) -> list[int]:
    """Return the character of each byte: decode strictly, and count one character for each error."""
    characters: list[int] = []
    n = 0
    while data:
        try:
            valid, bad = data.decode(), 0
        except UnicodeDecodeError as error:
            valid, bad = data[: error.start].decode(), error.end - error.start
        for character in valid:
            characters += [n] * len(character.encode())
            n += 1
        characters += [n] * bad
        n += bad > 0
        data = data[len(valid.encode()) + bad :]
    return characters


tokens = st.lists(
    st.one_of(st.binary(min_size=1, max_size=4), st.text(min_size=1, max_size=3).map(str.encode)), max_size=12
)


@given(tokens)
@example([b"\xff", b"a"])
@example([b"\xe2", b"\x82", b"\xac", b"b"])
@example([b"\xf0\x9f", b"x"])
def test_offsets_count_characters_before_each_token(tokens: list[bytes]) -> None:
    offsets = TextOffsets()
    expected = character_of_each_byte(b"".join(tokens))
    begin = 0
    for token in tokens:
        assert offsets.add(token) == expected[begin]
        begin += len(token)
