"""The parts of downloads on their own: names, what answers mean, checksums, the token's desk, TLS, missing pycurl."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import ipaddress
import itertools
import os
import resource
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from shpool.bearer import TokenDesk
from shpool.downloads.checksums import sent_digests
from shpool.downloads.copies import Copies
from shpool.downloads.curling import CurlOptions, parse_head
from shpool.downloads.fetching import GroupFetch, close_loop, open_loop
from shpool.downloads.filenames import (
    Folder,
    SeenPaths,
    checked_path,
    late_name,
    name_from_disposition,
    planned_path,
    safe_name,
)
from shpool.downloads.groups import unfetched
from shpool.downloads.incoming import Incoming
from shpool.downloads.items import DownloadItem, DownloadResult, FetchSettings, PlannedItem, Planner
from shpool.downloads.partfile import PartFile
from shpool.downloads.press import Press
from shpool.downloads.transfer import (
    NOTHING,
    Answer,
    Ask,
    Failure,
    Patience,
    Receive,
    Redirect,
    Refused,
    Standing,
    StartOver,
    Wanted,
    Whole,
    judge,
)
from shpool.errors import (
    ContentError,
    TargetPathError,
    TokenUnavailableError,
    TooManyOpenFilesError,
    TransferError,
)
from shpool.tokens import SYSTEM_CLOCK, Token, token_from_response

URL = "https://api.example/tiles/a.tif"
WANTED = Wanted(URL, "a.tif")
PART = Standing(100, '"v1"')
PIECE = bytes(1 << 16)
MOST_SENT = 64 << 20  # bytes; more than the buffers of a connection hold

# Names


@given(st.text(max_size=60))
def test_no_name_a_server_chooses_leaves_the_folder(text: str) -> None:
    """Whatever a URL or a header says, the name is one component that can be created."""
    for name in (safe_name(text), name_from_disposition(f'attachment; filename="{text}"'), late_name(URL, text)):
        if not name:
            continue
        assert "/" not in name
        assert name not in (".", "..")
        assert name[0] != "."
        assert name.isprintable() or all(char not in name for char in "\0\n\r\t")
        assert len(name.encode()) <= 240
        assert not name.endswith((".part", ".part.json"))
        assert "\\" not in name


@given(st.text(alphabet="./a\\\0-", max_size=12))
def test_no_path_a_user_gives_leaves_the_folder(path: str) -> None:
    try:
        found = checked_path(path)
    except TargetPathError:
        return
    assert os.path.normpath(f"/above/folder/{found}").startswith("/above/folder/")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("attachment; filename=a.tif", "a.tif"),
        ('attachment; filename="a b.tif"; size=3', "a b.tif"),
        ('attachment; filename="a\\"b.tif"', "a_b.tif"),
        ("inline; filename*=UTF-8''%e2%82%ac.tif", "€.tif"),
        ("inline; filename*=ISO-8859-1'en'%A3.tif", "£.tif"),
        ("attachment; filename=C:\\windows\\a.tif", "a.tif"),
        ("attachment; filename*=UTF-8''..%2F..%2Fa.tif", "a.tif"),
        ("attachment", ""),
        ("attachment; filename=..", ""),
        ("", ""),
    ],
)
def test_content_disposition_names_a_file(header: str, name: str) -> None:
    assert name_from_disposition(header) == name


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.example/a.tif?x=/b.zip", "a.tif"),
        ("https://api.example/%2e%2e%2fa.tif", "_.._a.tif"),
        ("https://api.example/x/CON.tif", "_CON.tif"),
        ("https://api.example/a.tif.part", None),
        ("https://api.example/Products(1)/$value", None),
        ("https://api.example/", None),
    ],
)
def test_a_url_names_a_file_where_it_ends_like_one(url: str, name: str | None) -> None:
    assert planned_path(url, None) == name


def test_long_names_keep_their_suffix_and_stay_apart() -> None:
    names = {safe_name(f"{'x' * 300}{n}.tif") for n in range(10)}
    assert len(names) == 10
    assert all(name.endswith(".tif") and len(name) == 240 for name in names)


def test_paths_seen_are_remembered_through_growth() -> None:
    seen = SeenPaths()
    assert all(seen.take(f"{n}.tif", ("owner", n), n) == n for n in range(5000))
    assert all(seen.take(f"{n}.tif", ("owner", n), 5000 + n) == n for n in range(5000))
    assert all(seen.take(f"{n}.tif", ("other", n), 5000 + n) is None for n in range(5000))


def test_a_copy_of_a_forgotten_failure_is_fetched_like_any_other_item() -> None:
    """Of the results that no number can tell, only the last ones are kept."""
    copies = Copies("d")
    urls = [f"https://api.example/{n}.tif" for n in range(10_001)]
    planned = copies.planned([*urls, urls[0], urls[-1]])
    firsts = [each for each in itertools.islice(planned, len(urls)) if isinstance(each, PlannedItem)]
    error = TransferError(URL, "HTTP 404", 404)
    for each in firsts:
        assert len(list(copies.told([unfetched(each.number, each.item.url, error)]))) == 1
    again, known = planned
    assert again == PlannedItem(10_001, DownloadItem(urls[0]), "0.tif")
    assert known == unfetched(10_002, urls[-1], error)


# What answers mean


def judged(
    status: int, fields: dict[str, str] | None = None, wanted: Wanted = WANTED, standing: Standing = NOTHING
) -> object:
    return judge(Answer(status, fields or {}), Ask(wanted, standing, wanted.url), now=0.0)


def test_a_whole_file_is_received_from_its_start() -> None:
    fields = {"content-length": "10", "etag": '"v2"', "content-md5": "1B2M2Y8AsgTpgAmY7PhCfg=="}
    digests = (("md5", "d41d8cd98f00b204e9800998ecf8427e"),)
    assert judged(200, fields, standing=PART) == Receive(0, 10, '"v2"', digests)


def test_a_part_is_continued_only_to_the_byte() -> None:
    good = {"content-range": "bytes 100-199/200", "etag": '"v1"'}
    assert judged(206, good, standing=PART) == Receive(100, 200, '"v1"')
    for wrong in (
        {"content-range": "bytes 101-199/200"},
        {},
        {**good, "etag": '"v2"'},
        {"content-range": "bytes */200"},
    ):
        assert isinstance(judged(206, wrong, standing=PART), StartOver)
    assert isinstance(judged(206, good), StartOver)


def test_a_range_behind_the_end_says_that_the_part_is_whole() -> None:
    assert judged(416, {"content-range": "bytes */100"}, standing=PART) == Whole()
    assert isinstance(judged(416, {"content-range": "bytes */99"}, standing=PART), StartOver)
    assert isinstance(judged(416), Failure)


@pytest.mark.parametrize("fields", [{"content-length": "9"}, {"content-range": "bytes 100-108/109"}])
def test_a_stated_size_must_be_the_given_one(fields: dict[str, str]) -> None:
    wanted = Wanted(URL, "a.tif", size=200)
    found = judged(206 if "content-range" in fields else 200, fields, wanted, PART)
    assert isinstance(found, Failure)
    assert isinstance(found.error, ContentError)


@pytest.mark.parametrize(
    ("status", "is_final"),
    [(404, True), (403, True), (202, True), (500, False), (502, False), (408, False), (429, False)],
)
def test_a_status_is_worth_another_attempt_or_not(status: int, is_final: bool) -> None:  # noqa: FBT001 - a case
    found = judged(status)
    assert isinstance(found, Failure)
    assert found.is_final == is_final


def test_a_refused_token_is_told_from_a_missing_scope() -> None:
    assert isinstance(judged(401, {"www-authenticate": 'Bearer error="invalid_token"'}), Refused)
    assert isinstance(judged(401, {"www-authenticate": 'Bearer error="insufficient_scope"'}), Failure)


def test_a_redirect_is_resolved_and_never_leads_away_from_https() -> None:
    assert judged(307, {"location": "../b.tif"}) == Redirect("https://api.example/b.tif")
    found = judged(302, {"location": "http://api.example/a.tif"})
    assert isinstance(found, Failure)
    assert isinstance(found.error, TransferError)
    assert found.is_final


def test_retries_are_counted_without_progress_only() -> None:
    patience = Patience(retries=2)
    assert [patience.has_more(10), patience.has_more(20), patience.has_more(30)] == [True, True, False]
    assert patience.has_more(2_000_000)
    assert [patience.has_more(0, is_pause=True) for _ in range(21)] == [True] * 20 + [False]


def test_the_strongest_checksum_of_a_header_counts() -> None:
    sha = "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"
    assert list(sent_digests({"repr-digest": f"md5=:1B2M2Y8AsgTpgAmY7PhCfg==:, {sha}"}, 206)) == ["sha256"]
    assert sent_digests({"content-md5": "1B2M2Y8AsgTpgAmY7PhCfg=="}, 206) == {}
    assert sent_digests({"repr-digest": "sha-256=:short:", "digest": "nonsense"}, 200) == {}


def test_of_several_heads_the_last_counts() -> None:
    lines = [b"HTTP/1.1 103 Early Hints\r\n", b"ETag: old\r\n", b"\r\n", b"HTTP/1.1 404 Not Found\r\n", b"\r\n"]
    assert parse_head(lines) == Answer(404, {})


@pytest.mark.parametrize(("raw", "text"), [("höhe".encode(), "höhe"), ("höhe".encode("latin-1"), "höhe")])
def test_a_field_in_raw_utf_8_or_latin_1_is_understood(raw: bytes, text: str) -> None:
    assert parse_head([b"HTTP/2 302 \r\n", b"Location: /" + raw + b".tif\r\n"]).fields == {"location": f"/{text}.tif"}


# The token


class Holder:
    """A shared session whose token comes when the test says so."""

    allowed_hosts: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.reports: list[int] = []
        self.newest = 1

    @property
    def token(self) -> Token:
        return token_from_response({"access_token": "invented"}, SYSTEM_CLOCK.now()).numbered(self.newest)

    def report_refused(self, generation: int) -> None:
        self.reports.append(generation)

    def wait_for_token(self, seconds: float, *, newer_than: int = -1) -> Token:
        assert seconds == 0.0
        if self.newest <= newer_than:
            reason = "none came"
            raise TokenUnavailableError(reason)
        return self.token


def test_a_generation_is_reported_once_and_never_handed_out_again() -> None:
    holder = Holder()
    desk = TokenDesk(holder)
    for _ in range(3):
        desk.report_refused(1)
    with pytest.raises(TokenUnavailableError):
        desk.token_for(URL)
    assert not desk.is_overdue()
    holder.newest = 2
    token = desk.token_for(URL)
    assert token is not None
    assert (token.generation, holder.reports) == (2, [1])


def test_a_host_that_is_not_allowed_is_asked_without_the_token() -> None:
    holder = Holder()
    holder.allowed_hosts = ("other.example",)
    assert TokenDesk(holder).token_for(URL) is None


# The part


def test_a_part_of_before_the_last_boot_is_trusted_only_with_a_checksum(tmp_path: Path) -> None:
    stem = str(tmp_path / "a.tif")
    part = PartFile.open(stem, create=True)
    assert part is not None
    part.note("url", '"v1"', "a.tif")
    part.append([b"half"])
    part.close()
    note = tmp_path / "a.tif.part.json"
    for text, is_provable, expected in (
        (note.read_text(), False, Standing(4, '"v1"')),
        (note.read_text().replace('"boot": "', '"boot": "former'), False, NOTHING),
        (note.read_text().replace('"boot": "', '"boot": "former'), True, Standing(4)),
        ("{", False, NOTHING),
        ('{"format": 9}', False, NOTHING),
    ):
        note.write_text(text)
        again = PartFile.open(stem, create=False)
        assert again is not None
        assert again.standing("url", is_provable=is_provable) == expected
        again.close()


def test_a_part_of_another_url_is_not_continued(tmp_path: Path) -> None:
    part = PartFile.open(str(tmp_path / "a.tif"), create=True)
    assert part is not None
    part.note("url", '"v1"', "a.tif")
    part.append([b"half"])
    assert part.standing("another", is_provable=False) == NOTHING
    part.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_is_pending_when_a_run_ends_stays_a_part(tmp_path: Path) -> None:
    from shpool.downloads.filenames import Folder
    from shpool.downloads.press import Arrived

    part = PartFile.open(str(tmp_path / "a.tif"), create=True)
    assert part is not None
    part.append([b"all of it"])
    press: Press[str] = Press(Folder(str(tmp_path)), durable=True)
    press.add("a", Arrived(part, str(tmp_path / "a.tif")))
    press.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif.part"]


def test_a_file_that_comes_alone_waits_for_no_other(tmp_path: Path) -> None:
    from shpool.downloads.filenames import Folder
    from shpool.downloads.press import Arrived

    part = PartFile.open(str(tmp_path / "a.tif"), create=True)
    assert part is not None
    press: Press[str] = Press(Folder(str(tmp_path)), durable=False)
    press.add("a", Arrived(part, str(tmp_path / "a.tif")))
    assert [owner for owner, _ in press.take(hurry=False)] == ["a"]


# A body without an end


class _Endless(http.server.BaseHTTPRequestHandler):
    """Send far more than is stated, in chunks, for as long as somebody takes it."""

    protocol_version = "HTTP/1.1"
    sent = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        if self.path == "/stated.tif":
            self.send_header("Content-Length", "1000")
        self.end_headers()
        with contextlib.suppress(OSError):  # nobody takes it any more
            for _ in range(MOST_SENT // len(PIECE)):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(PIECE), PIECE))
                _Endless.sent += len(PIECE)
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("item", [{"url": "given.tif", "size": 1000}, {"url": "stated.tif"}], ids=["given", "stated"])
def test_a_body_beyond_the_known_size_is_ended_there(item: dict[str, Any], tmp_path: Path) -> None:
    _Endless.sent = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/{item['url']}"
            result = fetch_one({**item, "url": url}, tmp_path / "d", None)
        finally:
            server.shutdown()
            thread.join()
    assert isinstance(result.error, ContentError)
    assert "it is more than 1000 bytes; what was sent is thrown away" in str(result.error)
    assert _Endless.sent < MOST_SENT
    assert list((tmp_path / "d").iterdir()) == []


# TLS


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Serve one file over TLS; yield its URL and the file of the authority to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = dt.datetime.now(dt.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, key_file = tmp_path / "ca.pem", tmp_path / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key_file)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _OneFile) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_address[1]}/a.tif", str(pem)
        finally:
            server.shutdown()
            thread.join()


class _OneFile(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"tile")

    def log_message(self, *args: object) -> None:
        pass


def fetch_one(item: str | dict[str, Any], folder: Path, ca_bundle: str | None) -> DownloadResult:
    settings = FetchSettings(str(folder), CurlOptions(ca_bundle=ca_bundle), retries=0)
    try:
        results, left = GroupFetch(settings, open_loop(settings.curl), None).run([Planner().plan(0, item)])
    finally:
        close_loop()
    assert (len(results), left) == (1, [])
    return results[0]


def test_certificates_are_verified(tls_server: tuple[str, str], tmp_path: Path) -> None:
    url, authority = tls_server
    untrusted = fetch_one(url, tmp_path / "d", None)
    assert isinstance(untrusted.error, TransferError)
    assert not untrusted.error.is_temporary
    assert fetch_one(url, tmp_path / "d", authority).status == "done"
    assert fetch_one(url.replace("127.0.0.1", "localhost"), tmp_path / "e", authority).status == "failed"


# Without pycurl


def test_without_pycurl_the_error_names_the_extra(tmp_path: Path, child_env: dict[str, str]) -> None:
    (tmp_path / "pycurl.py").write_text("raise ImportError('not here')\n")
    program = (
        "import shpool\ntry:\n    shpool.download(None, [], 'd')\nexcept shpool.ShpoolError as exc:\n    print(exc)"
    )
    env = {**child_env, "PYTHONPATH": f"{tmp_path}{os.pathsep}{child_env['PYTHONPATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == "pycurl is not installed; run: pip install 'shpool[download]'\n"


def test_importing_shpool_imports_no_pycurl(child_env: dict[str, str]) -> None:
    program = "import sys, shpool; sys.exit('pycurl' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], env=child_env, check=True)


# Descriptors


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Let this process open nothing more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_part_for_which_no_descriptor_is_left_is_looked_for_again(tmp_path: Path) -> None:
    planned = Planner().plan(0, {"url": URL, "sha256": "0" * 64})
    (tmp_path / "a.tif.part").write_bytes(bytes(100))
    incoming = Incoming(planned, Folder(str(tmp_path)), FetchSettings(str(tmp_path)), "s")
    with no_descriptor_left():
        assert incoming.look() is None
    assert incoming.request_fields() == ["Range: bytes=100-"]
    incoming.close()


def test_too_many_open_files_are_a_temporary_failure_with_its_own_words(tmp_path: Path) -> None:
    planned = Planner().plan(0, URL)
    incoming = Incoming(planned, Folder(str(tmp_path)), FetchSettings(str(tmp_path)), "s")
    assert incoming.look() is None
    incoming.request_fields()
    incoming.take_head(Answer(200, {}))
    with no_descriptor_left():
        incoming.take_body(b"tile")
        failure = incoming.conclude(None)
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, TooManyOpenFilesError)
    assert not failure.is_final
    assert "ulimit -n" in str(failure.error)
    assert "permissions" not in str(failure.error)


def limited(limit: int, body: str, env: dict[str, str]) -> str:
    """Return what a program prints that may have so many files open."""
    program = f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n{body}"
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("limit", "most"), [(256, 64), (1024, 256), (4096, 1792), (16, 4)])
def test_transfers_have_half_of_the_descriptors_or_more(limit: int, most: int, child_env: dict[str, str]) -> None:
    body = "from shpool.downloads.descriptors import enough_for, most_transfers\n"
    body += "most = most_transfers()\nprint(most, enough_for(most))"
    assert limited(limit, body, child_env) == f"{most} {limit}\n"


def test_more_connections_than_there_are_descriptors_are_refused(child_env: dict[str, str]) -> None:
    body = "import shpool\ntry:\n    shpool.download(None, [], 'd', connections=257)\nexcept ValueError as exc:\n"
    told = limited(1024, f"{body}    print(exc)", child_env)
    assert "connections=257" in told
    assert "at most 256; raise the limit to 1026 (ulimit -n)" in told
