"""Corpora: two domains, a split that shares nothing, and sources that say why they have no text."""

import itertools
import sys
import types
from collections import Counter

import pytest

from minids.files import corpus as source
from minids.files.corpus import load_corpus

# "about 5 %": the split's salt was chosen for Python 3.11; elsewhere the standard library is
# another draw of documents of unequal length
SHARES = (0.03, 0.08) if sys.version_info[:2] == (3, 11) else (0.005, 0.2)


@pytest.fixture(scope="module")
def corpus() -> source.Corpus:
    return load_corpus()


@pytest.fixture
def folder(tmp_path):
    """Prose and code, among things that are neither."""
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(f"prose {n}\n")
        (tmp_path / f"{n}.py").write_text(f"code = {n}\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    return tmp_path


def everything(corpus: source.Corpus) -> list[str]:
    return [text for side in corpus for texts in side.values() for text in texts]


def test_stdlib_has_two_domains_and_holds_out_five_percent(corpus):
    for domain, least in (("prose", 300_000), ("code", 2_000_000)):
        train = sum(map(len, corpus.train[domain]))
        heldout = sum(map(len, corpus.heldout[domain]))
        assert train + heldout > least
        assert SHARES[0] < heldout / (train + heldout) < SHARES[1]
        assert len(corpus.heldout[domain]) >= 3


def test_stdlib_is_deterministic_and_has_no_tests(corpus):
    assert load_corpus() == corpus
    assert not any("unittest.main(" in text[-200:] for text in corpus.train["code"])


def test_no_document_is_on_both_sides(corpus):
    assert max(Counter(everything(corpus)).values()) == 1


def test_no_prose_is_a_section_of_other_prose(corpus):
    """The raw topics repeat each other: "if" stands whole in "compound"; one side would leak."""
    texts = corpus.train["prose"] + corpus.heldout["prose"]
    lines = [{line.strip() for line in text.splitlines() if len(line) > 40} for text in texts]
    for a, b in itertools.permutations(lines, 2):
        assert len(a & b) <= 0.5 * len(a)


def test_identical_files_are_one_document(folder):
    whole = load_corpus(folder)
    (folder / "copy.txt").write_text("prose 3\n")
    (folder / "copy.py").write_text("prose 3\n")
    again = load_corpus(folder)
    assert Counter(everything(again)) == Counter(everything(whole))


def test_split_is_stable_when_documents_are_added(folder):
    for n in range(30, 300):
        (folder / f"{n}.txt").write_text(f"prose {n}\n")
    before = load_corpus(folder)
    assert len(before.heldout["prose"]) > 3
    for n in range(300, 600):
        (folder / f"{n}.txt").write_text(f"prose {n}\n")
    after = load_corpus(folder)
    assert set(before.heldout["prose"]) < set(after.heldout["prose"])
    assert set(before.train["prose"]) < set(after.train["prose"])


@pytest.mark.parametrize("count", range(2, 12))
def test_neither_side_is_empty(tmp_path, count):
    for n in range(count):
        (tmp_path / f"{n}.txt").write_text(f"{count} {n}")
    corpus = load_corpus(tmp_path)
    assert corpus.heldout["prose"]
    assert corpus.train["prose"]
    assert set(corpus.train) == set(corpus.heldout) == {"prose"}


def test_folder_has_two_domains_by_suffix(folder):
    corpus = load_corpus(str(folder))
    for domain, start in (("prose", "prose "), ("code", "code = ")):
        texts = corpus.train[domain] + corpus.heldout[domain]
        assert len(texts) == 30
        assert all(text.startswith(start) for text in texts)


def test_one_file_becomes_several_documents(tmp_path):
    """A long one in pieces of at most LONGEST, a short one in about 20, cut at line ends."""
    for lines in (100_000, 50):
        text = "".join(f"line {n} of it\n" for n in range(lines))
        (tmp_path / "text.md").write_text(text)
        corpus = load_corpus(tmp_path / "text.md")
        pieces = everything(corpus)
        assert len(pieces) >= 15
        assert all(piece.endswith("\n") and len(piece) <= source.LONGEST for piece in pieces)
        assert sorted("".join(pieces).splitlines()) == sorted(text.splitlines())


def test_a_hidden_file_is_read_when_named(tmp_path):
    (tmp_path / ".notes").write_text("line one\nline two\n")
    assert sorted(everything(load_corpus(tmp_path / ".notes"))) == ["line one\n", "line two\n"]


def test_lines_longer_than_a_document_are_cut_anyway(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{n}," for n in range(20_000)))
    assert max(map(len, everything(load_corpus(tmp_path)))) <= source.LONGEST


@pytest.mark.parametrize("limit", [1_000, 50_000])
def test_max_chars_is_the_size_of_a_domain(limit):
    corpus = load_corpus(max_chars=limit)
    for domain in ("prose", "code"):
        assert sum(map(len, corpus.train[domain] + corpus.heldout[domain])) == limit


def test_files_without_text_are_skipped_aloud(folder):
    (folder / "empty.txt").write_text(" \n")
    (folder / "zeros.bin").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.warns(UserWarning, match="skipped 3 files") as caught:
        corpus = load_corpus(folder)
    for reason in (r"empty.txt (empty)", "zeros.bin (binary)", "latin.txt (not UTF-8)"):
        assert reason in str(caught[0].message)
    assert len(everything(corpus)) == 60


@pytest.mark.parametrize("content", [b"", b"a\0b", b"\xff\xfe\xfa"])
@pytest.mark.filterwarnings("ignore:skipped 1 file")
def test_a_file_without_text_is_refused(tmp_path, content):
    (tmp_path / "it.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"no text in .*it\.txt"):
        load_corpus(tmp_path / "it.txt")


def test_bad_sources_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*nowhere"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no text in"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="max_chars must be at least 1, got 0"):
        load_corpus(max_chars=0)
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(ValueError, match="prose needs two different documents"):
        load_corpus(tmp_path)


# hf:NAME


def fake_datasets(monkeypatch, rows):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(("column", "domain"), [("text", "prose"), ("content", "code")])
def test_hf_streams_a_data_set(monkeypatch, column, domain):
    asked = fake_datasets(monkeypatch, [{"id": n, column: f"row {n}"} for n in range(50)])
    corpus = load_corpus("hf:owner/name", max_chars=100)
    assert asked == [("owner/name", "train", True)]
    assert set(corpus.train) == {domain}
    assert sum(map(len, everything(corpus))) == 100


def test_hf_errors_name_the_reason(monkeypatch):
    fake_datasets(monkeypatch, [{"label": 1}])
    with pytest.raises(ValueError, match=r"needs a column text, content or code, got \['label'\]"):
        load_corpus("hf:x")
    fake_datasets(monkeypatch, ConnectionError("offline"))
    with pytest.raises(ValueError, match=r"cannot read hf:x.*offline"):
        load_corpus("hf:x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="hf:x needs 'pip install datasets'"):
        load_corpus("hf:x")


# fill in the middle
