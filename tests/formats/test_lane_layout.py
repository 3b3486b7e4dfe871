"""The lanes' layout: read as a kernel reads it, every code is where the module's tables say."""

from __future__ import annotations

import pytest
import torch

from kvquant.formats.lane_layout import bit_sources, looked_up, pack_chunks, unpack_chunks

WIDTHS = range(1, 7)


def random_codes(width: int, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << width, (*shape, 64, 16), generator=generator, dtype=torch.uint8)


def words_of(packed: torch.Tensor, width: int) -> list[list[int]]:
    """The words of each lane, `[32][width]`, from the bytes of one chunk."""
    raw = packed.view(width, 32, 4).long()
    words = (raw << torch.tensor([0, 8, 16, 24])).sum(-1)
    return [list(map(int, lane)) for lane in words.T]


def selectors(words: list[int], width: int, m: int) -> int:
    """The selector word of a tile of tokens: nibbles are codes of h, s and e."""
    if width == 4:
        return words[m]
    selector = words[m // 2] >> (2 * (m % 2)) & 0x33333333
    if width == 3:
        top = words[2]
        selector |= (top << (2 - m) if m < 2 else top >> (m - 2)) & 0x44444444
    return selector


def computed(words: list[int], width: int, item: int, e: int) -> int:
    """The code of an item by shifts and masks, written for each width on its own."""
    halves = [word >> (16 * e) & 0xFFFF for word in words]
    j, s = divmod(item, 2)
    match width:
        case 1:
            return halves[0] >> item & 1
        case 4:
            return halves[item // 4] >> (4 * (item % 4)) & 15
        case 5 if item == 15:
            return sum((half >> 15) << i for i, half in enumerate(halves))
        case 5:
            places = [(k, 0) for k in range(5)] + [(0, 10), (1, 10), (2, 10)]
            others = [(k, 5) for k in range(5)] + [(3, 10), (4, 10)]
            word, shift = (others if s else places)[j]
            return halves[word] >> shift & 31
        case _:
            if item < 12:
                return halves[item // 2] >> (6 * (item % 2)) & 63
            left = [half >> 12 for half in halves]  # 4 bits of each word
            low, high = [(0, 1), (2, 1), (3, 4), (5, 4)][item - 12]
            return left[low] | (left[high] >> (2 * (item % 2)) & 3) << 4


@pytest.mark.parametrize("of_keys", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_warp_finds_its_operands(width: int, of_keys: bool) -> None:
    codes = random_codes(width, width)
    lanes = words_of(pack_chunks(codes, width, of_keys=of_keys), width)
    for lane, words in enumerate(lanes):
        g, t = divmod(lane, 4)
        for item in range(16):
            m, h, s = item // 4, item // 2 % 2, item % 2
            for e in range(2):
                if of_keys:
                    token, channel = 16 * m + 8 * h + g, 8 * s + 2 * t + e
                else:
                    token, channel = 16 * m + 8 * h + 2 * t + e, 8 * s + g
                if width in looked_up(of_keys=of_keys):
                    found = selectors(words, width, m) >> (4 * (4 * h + 2 * s + e)) & 15
                else:
                    found = computed(words, width, item, e)
                assert found == codes[token, channel]


@pytest.mark.parametrize("of_keys", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_bit_is_lost(width: int, of_keys: bool) -> None:
    sources = bit_sources(width, of_keys=of_keys)
    assert torch.equal(sources.sort().values, torch.arange(1024 * width))
    codes = random_codes(width, 7, 2, 3)
    packed = pack_chunks(codes, width, of_keys=of_keys)
    assert packed.shape == (2, 3, 128 * width)
    assert torch.equal(unpack_chunks(packed, width, of_keys=of_keys), codes)
