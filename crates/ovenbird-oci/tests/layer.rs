//! Layers: what is packed comes back, what is hostile stays inside.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use ovenbird_oci::Digest;
use ovenbird_oci::layer::tar::{Header, Kind, Reader, encode, padding};
use ovenbird_oci::layer::{Compression, LayerError, Lower, Owner, Owners, Ownership, PackOptions, Packed, extract, pack, unpack};
use ovenbird_oci::store::Store;
use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

const NONE: PackOptions = PackOptions { compression: Compression::None, mtime: None, threads: 1 };

fn no_lower(_: &Path) -> Option<Lower> {
    None
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root, for owners and devices");
    }
    root
}

/// Everything about a tree, one line a path; written without the code under test.
fn describe(root: &Path) -> BTreeMap<String, String> {
    fn visit(root: &Path, dir: &Path, links: &mut BTreeMap<u64, String>, out: &mut BTreeMap<String, String>) {
        let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            let meta = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            let kind = FileType::from_raw_mode(meta.mode());
            if kind == FileType::CharacterDevice && meta.rdev() == 0 {
                out.insert(name, "whiteout".into());
                continue;
            }
            let mut line = format!("{kind:?} {:o} {}:{} {}", meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.mtime());
            match kind {
                FileType::RegularFile => drop(write!(line, " {} {}", meta.len(), Digest::of(&fs::read(&path).unwrap()).short())),
                FileType::Symlink => drop(write!(line, " -> {}", fs::read_link(&path).unwrap().display())),
                FileType::CharacterDevice | FileType::BlockDevice => drop(write!(line, " {:x}", meta.rdev())),
                _ => {}
            }
            if kind != FileType::Directory && meta.nlink() > 1 {
                let _ = write!(line, " = {}", links.entry(meta.ino()).or_insert_with(|| name.clone()));
            }
            let mut list = vec![0; 65536];
            let n = rustix::fs::llistxattr(&path, &mut list[..]).unwrap();
            let mut names: Vec<_> = list[..n].split(|&b| b == 0).filter(|n| !n.is_empty()).collect();
            names.sort_unstable();
            for xattr in names {
                let mut value = vec![0; 65536];
                let n = rustix::fs::lgetxattr(&path, xattr, &mut value[..]).unwrap();
                let _ = write!(line, " {}={:?}", String::from_utf8_lossy(xattr), &value[..n]);
            }
            out.insert(name, line);
            if kind == FileType::Directory {
                visit(root, &path, links, out);
            }
        }
    }
    let mut out = BTreeMap::new();
    visit(root, root, &mut BTreeMap::new(), &mut out);
    out
}

struct Place {
    dir: tempfile::TempDir,
    store: Store,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        Self { dir, store }
    }
    fn folder(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }
    fn tar(&self, packed: &Packed) -> Vec<u8> {
        let mut bytes = vec![];
        self.store.open_blob(&packed.digest).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }
}

fn list(tar: &[u8]) -> Vec<Header> {
    let mut reader = Reader::new(tar);
    std::iter::from_fn(|| reader.next().unwrap()).collect()
}

fn names(tar: &[u8]) -> Vec<String> {
    list(tar).iter().map(|h| String::from_utf8_lossy(&h.path).into_owned()).collect()
}

fn setxattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn mknod(path: &Path, kind: FileType, mode: u32, major: u32, minor: u32) {
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(mode), rustix::fs::makedev(major, minor)).unwrap();
}

/// One of everything. Returns the folder.
fn sample(place: &Place) -> PathBuf {
    let root = place.folder("sample");
    fs::create_dir_all(root.join("etc/opaque")).unwrap();
    fs::write(root.join("etc/passwd"), "root").unwrap();
    fs::hard_link(root.join("etc/passwd"), root.join("etc/zlink")).unwrap();
    fs::write(root.join("etc-file"), vec![b'x'; 3_000_000]).unwrap();
    fs::write(root.join("suid"), "#!").unwrap();
    std::os::unix::fs::chown(root.join("suid"), Some(1000), Some(3_000_000)).unwrap();
    fs::set_permissions(root.join("suid"), fs::Permissions::from_mode(0o6755)).unwrap();
    setxattr(&root.join("suid"), "user.binary", b"\0=\n\xff");
    setxattr(&root.join("suid"), "user.overlay.origin", b"noise");
    setxattr(&root.join("suid"), "trusted.overlay.uuid", b"noise");
    setxattr(&root.join("suid"), "security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    setxattr(&root.join("etc/opaque"), "user.overlay.opaque", b"y");
    mknod(&root.join("gone"), FileType::CharacterDevice, 0, 0, 0);
    fs::hard_link(root.join("gone"), root.join("etc/gone")).unwrap();
    mknod(&root.join("null"), FileType::CharacterDevice, 0o666, 1, 3);
    mknod(&root.join("pipe"), FileType::Fifo, 0o640, 0, 0);
    symlink("/etc/passwd", root.join("absolute")).unwrap();
    symlink("x".repeat(300), root.join("long-target")).unwrap();
    let long = root.join("d".repeat(120)).join("ü");
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join(OsStr::from_bytes(b"raw\xff")), "").unwrap();
    drop(std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap());
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(2_500_000).unwrap();
    fs::set_permissions(root.join("etc"), fs::Permissions::from_mode(0o1770)).unwrap();
    root
}

#[test]
fn everything_survives_and_other_tools_agree() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let root = sample(&place);
    let packed = pack(&root, &Owners::new(), &NONE, &place.store).unwrap();
    assert_eq!((packed.diff_id, packed.size), (packed.digest, packed.uncompressed));
    let tar = place.tar(&packed);
    let got = names(&tar);
    let long = "d".repeat(120);
    let mut expected = vec!["absolute".to_owned(), format!("{long}/"), format!("{long}/ü/"), format!("{long}/ü/raw\u{fffd}")];
    expected.extend(
        ["etc/", "etc/.wh.gone", "etc/opaque/", "etc/opaque/.wh..wh..opq", "etc/passwd", "etc/zlink", "etc-file", ".wh.gone"]
            .map(str::to_owned),
    );
    expected.extend(["long-target", "null", "pipe", "sparse", "suid"].map(str::to_owned));
    assert_eq!(got, expected);
    let suid = list(&tar).pop().unwrap();
    assert_eq!((suid.uid, suid.gid, suid.mode), (1000, 3_000_000, 0o6755));
    let attributes: Vec<_> = suid.xattrs.iter().map(|(n, _)| String::from_utf8_lossy(n).into_owned()).collect();
    assert_eq!(attributes, ["security.capability", "user.binary"]);

    let back = place.folder("back");
    let owners = unpack(&tar[..], &back, Some(&packed.diff_id), Ownership::Real, &no_lower).unwrap();
    assert!(owners.is_empty());
    let (mut before, after) = (describe(&root), describe(&back));
    before.remove("socket");
    before.get_mut("suid").map(|l| *l = l.replace(" user.overlay.origin=[110, 111, 105, 115, 101]", "")).unwrap();
    before.get_mut("suid").map(|l| *l = l.replace(" trusted.overlay.uuid=[110, 111, 105, 115, 101]", "")).unwrap();
    assert_eq!(before, after);
    assert_eq!(pack(&back, &owners, &NONE, &place.store).unwrap(), packed);

    // GNU tar sees the same files.
    let gnu = place.folder("gnu");
    let file = place.store.blob_path(&packed.digest);
    match Command::new("tar").args(["--xattrs", "--xattrs-include=*", "-xpf"]).arg(&file).arg("-C").arg(&gnu).status() {
        Err(e) => eprintln!("skipped: no GNU tar here ({e})"),
        Ok(status) => {
            assert!(status.success());
            let (mut mine, mut theirs) = (describe(&back), describe(&gnu));
            mine.retain(|name, line| line != "whiteout" && name != "etc/opaque");
            theirs.retain(|name, _| !name.contains(".wh.") && name != "etc/opaque");
            assert_eq!(mine, theirs);
        }
    }
}

#[test]
fn same_bytes_for_any_number_of_threads() {
    let place = Place::new();
    let root = place.folder("tree");
    for i in 0..14u32 {
        let content: Vec<u8> = (0..300_000u32).map(|n| (n.wrapping_mul(i + 7) >> 5) as u8).collect();
        fs::write(root.join(format!("file{i}")), content).unwrap();
    }
    for compression in [Compression::None, Compression::Gzip(5), Compression::Zstd(3)] {
        let run = |threads| pack(&root, &Owners::new(), &PackOptions { compression, mtime: Some(7), threads }, &place.store).unwrap();
        let one = run(1);
        assert_eq!([run(0), run(2), run(5)], [one.clone(), one.clone(), one.clone()], "{compression:?}");
        let back = tempfile::tempdir().unwrap();
        let blob = place.store.open_blob(&one.digest).unwrap();
        unpack(blob, back.path(), Some(&one.diff_id), Ownership::Real, &no_lower).unwrap();
        assert_eq!(fs::read(back.path().join("file9")).unwrap(), fs::read(root.join("file9")).unwrap());
        assert_eq!(fs::metadata(back.path().join("file3")).unwrap().mtime(), 7);
    }
    assert!(place.store.dir().join("tmp").read_dir().unwrap().next().is_none());
}

#[test]
fn what_cannot_be_packed_is_refused() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let check = |name: &str, make: &dyn Fn(&Path), expected: &str| {
        let root = place.folder(name);
        make(&root);
        let options = PackOptions { compression: Compression::Gzip(1), mtime: None, threads: 2 };
        let error = pack(&root, &Owners::new(), &options, &place.store).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
    };
    check("whiteout-name", &|r| fs::write(r.join(".wh.x"), "").unwrap(), "rename it");
    check(
        "redirect",
        &|r| (fs::create_dir(r.join("d")).unwrap(), setxattr(&r.join("d"), "user.overlay.redirect", b"x")).1,
        "redirect_dir=off",
    );
    check("equals", &|r| (fs::write(r.join("f"), "").unwrap(), setxattr(&r.join("f"), "user.a=b", b"x")).1, "setfattr -x");
    let deep = |root: &Path, levels: usize| {
        let mut fd = rustix::fs::open(root, rustix::fs::OFlags::RDONLY, Mode::empty()).unwrap();
        for _ in 0..levels {
            rustix::fs::mkdirat(&fd, "abcdefghi", Mode::RWXU).unwrap();
            fd = rustix::fs::openat(&fd, "abcdefghi", rustix::fs::OFlags::RDONLY, Mode::empty()).unwrap();
        }
    };
    check("deep", &|r| deep(r, 1000), "longer than 4,096 bytes");
    assert!(pack(&place.dir.path().join("missing"), &Owners::new(), &NONE, &place.store).is_err());
    let error = pack(Path::new("/proc/sys/kernel/random"), &Owners::new(), &NONE, &place.store).unwrap_err().to_string();
    assert!(error.contains("changed while it was being packed"), "{error}");
    assert!(place.store.blobs().unwrap().is_empty());
    // More levels than folders stay open.
    let (root, back) = (place.folder("levels"), place.folder("levels-back"));
    deep(&root, 300);
    let packed = pack(&root, &Owners::new(), &NONE, &place.store).unwrap();
    unpack(&place.tar(&packed)[..], &back, None, Ownership::Real, &no_lower).unwrap();
    assert_eq!(describe(&root), describe(&back));
}

#[test]
fn owners_are_recorded_and_packed() {
    let place = Place::new();
    let tar = Tar::default()
        .with(|h| (h.uid, h.mode) = (5, 0o755), "d/", Kind::Directory, "")
        .with(|h| (h.uid, h.gid, h.mode) = (1, 2, 0o4755), "d/f", Kind::File, "abc")
        .with(|h| (h.link, h.uid, h.gid, h.mode) = (b"d/f".to_vec(), 1, 2, 0o4755), "d/g", Kind::Link, "")
        .with(|h| (h.device, h.mode) = ((8, 1), 0o660), "disk", Kind::Block, "")
        .with(|h| h.mode = 0o444, "plain", Kind::File, "")
        .with(|h| (h.gid, h.link, h.mode) = (9, b"t".to_vec(), 0o777), "s", Kind::Symlink, "")
        .end();
    let dir = place.folder("recorded");
    let owners = unpack(&tar[..], &dir, None, Ownership::Recorded, &no_lower).unwrap();
    let owner = |uid, gid, node| Owner { uid, gid, node };
    let expected: Owners = [
        ("d", owner(5, 0, None)),
        ("d/f", owner(1, 2, None)),
        ("d/g", owner(1, 2, None)),
        ("disk", owner(0, 0, Some((0o060_660, 8, 1)))),
        ("s", owner(0, 9, None)),
    ]
    .map(|(p, o)| (p.into(), o))
    .into();
    assert_eq!(owners, expected);
    assert_eq!(fs::metadata(dir.join("d/f")).unwrap().mode() & 0o7777, 0o4755);
    let packed = pack(&dir, &owners, &NONE, &place.store).unwrap();
    if is_root() {
        assert_eq!(place.tar(&packed), tar, "what was recorded comes out again");
    }
}

/// A tar made by hand.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn with(mut self, set: impl FnOnce(&mut Header), path: &str, kind: Kind, content: &str) -> Self {
        let mut header = Header::new(path, kind);
        header.mode = if kind == Kind::Directory { 0o755 } else { 0o644 };
        header.size = content.len() as u64;
        set(&mut header);
        encode(&header, &mut self.0);
        self.0.extend_from_slice(content.as_bytes());
        self.0.resize(self.0.len() + padding(content.len() as u64), 0);
        self
    }
    fn file(self, path: &str) -> Self {
        self.with(|_| {}, path, Kind::File, "new")
    }
    fn folder(self, path: &str) -> Self {
        self.with(|_| {}, path, Kind::Directory, "")
    }
    fn symlink(self, path: &str, target: &str) -> Self {
        self.with(|h| h.link = target.into(), path, Kind::Symlink, "")
    }
    fn link(self, path: &str, target: &str) -> Self {
        self.with(|h| h.link = target.into(), path, Kind::Link, "")
    }
    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

/// Unpacks beside a folder `outside` that must not change. The error, or the names made.
fn attack(tar: &[u8]) -> Result<Vec<String>, LayerError> {
    let dir = tempfile::tempdir().unwrap();
    let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
    fs::create_dir(&root).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let before = describe(&outside);
    let result = unpack(tar, &root, None, Ownership::Real, &no_lower);
    assert_eq!(describe(&outside), before, "something outside changed");
    assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    result.map(|_| describe(&root).into_keys().collect())
}

#[test]
fn hostile_layers_stay_inside() {
    let t = Tar::default;
    let huge = "a".repeat(255) + "/";
    // A tar, and the error's beginning or the names it makes.
    let rows: Vec<(Tar, Result<&[&str], &str>)> = vec![
        (t().file("../outside/x"), Err("the layer entry \"../outside/x\" leaves the root")),
        (t().file("a/../../outside/x"), Err("the layer entry")),
        (t().folder(".."), Err("the layer entry")),
        (t().file("/etc/x"), Ok(&["etc", "etc/x"])),
        (t().file("//./a/../b"), Ok(&["b"])),
        (t().file("."), Ok(&[])),
        (t().folder("./").file("./x"), Ok(&["x"])),
        (t().symlink("e", "../outside").file("e/x"), Ok(&["e", "outside", "outside/x"])),
        (t().symlink("e", "/../..//outside").file("e/x"), Ok(&["e", "outside", "outside/x"])),
        (t().symlink("e", "..").file("e/outside/secret"), Ok(&["e", "outside", "outside/secret"])),
        (t().symlink("e", "../outside").file("e/.wh.secret"), Ok(&["e", "outside", "outside/secret"])),
        (t().symlink("e", "../outside").file("e/.wh..wh..opq"), Ok(&["e", "outside"])),
        (t().symlink("e", "../outside/secret").file("e"), Ok(&["e"])),
        (t().symlink("e", "../outside").folder("e/").file("e/x"), Ok(&["e", "e/x"])),
        (t().symlink("e", "../outside").folder("e/.").file("e/x"), Ok(&["e", "e/x"])),
        (t().symlink("a", "b").symlink("b", "a").file("a/x"), Err("the layer entry")),
        (t().symlink("a", "a/a").file("a/x"), Err("the layer entry")),
        (t().link("l", "../outside/secret"), Err("the layer entry \"l\" leaves the root")),
        (t().link("l", "/"), Err("the layer entry")),
        (t().symlink("e", "../outside").link("l", "e/secret"), Err("the layer cannot be read: \"l\" links to")),
        (t().symlink("e", "../outside/secret").link("l", "e").file("l"), Ok(&["e", "l"])),
        (t().link("l", "missing"), Err("the layer cannot be read")),
        (t().folder("d").link("l", "d"), Err("the layer cannot be read")),
        (t().file("f").link("f", "f").link("f", "./f"), Ok(&["f"])),
        (t().file("f").link("g", "/f"), Ok(&["f", "g"])),
        (t().file("f").file("f/x"), Err("the layer cannot be read")),
        (t().file("f").folder("f/").file("f/x"), Ok(&["f", "f/x"])),
        (t().file("d/e/f").file("d"), Ok(&["d"])),
        (t().file("a/.wh..."), Err("the layer entry")),
        (t().file(".wh.."), Err("the layer entry")),
        (t().file(".wh."), Err("the layer entry")),
        (t().folder(".wh..wh.plnk").file(".wh..wh.plnk/1").file(".wh..wh.aufs"), Ok(&[])),
        (t().file(".wh.x/y"), Err("the layer cannot be read")),
        (t().file(&format!("{}x", huge.repeat(17))), Err("the layer cannot be read: the path")),
        (t().file(&"a".repeat(300)), Err("the layer cannot be read: \"aaa")),
        (t().file(&format!("{}/x", "a".repeat(300))), Err("the layer cannot be read: \"aaa")),
        (t().symlink("l", &"a".repeat(300)).file("l/x"), Err("the layer cannot be read: \"aaa")),
        (t().symlink("l", &"a/".repeat(5000)), Err("the layer cannot be read: the symlink \"l\" has a target of 10000 bytes")),
        (t().symlink("l", ""), Err("the layer cannot be read: the symlink")),
        (t().file("f").link("l", &"a".repeat(300)), Err("the layer cannot be read")),
        (t().file(&"d/".repeat(5000)).file("x"), Err("the layer cannot be read: the path \"d/d/")),
        (
            t().with(|h| h.path = [&b"a".repeat(150)[..], b"\0b"].concat(), "", Kind::File, ""),
            Err("the layer cannot be read: a name contains"),
        ),
        (t().with(|h| h.uid = 1 << 40, "f", Kind::File, ""), Err("the layer cannot be read: the owner")),
        (t().with(|h| h.size = 10 << 30, "f", Kind::File, ""), Err("the layer cannot be read: it is cut short")),
        (t().with(|h| h.size = u64::MAX, "f", Kind::File, ""), Err("the layer cannot be read")),
        (t().with(|h| h.xattrs = vec![(b"user.x".to_vec(), vec![0; 2 << 20])], "f", Kind::File, ""), Err("the layer cannot be read")),
    ];
    for (i, (tar, expected)) in rows.into_iter().enumerate() {
        match (attack(&tar.end()), expected) {
            (Ok(made), Ok(names)) => assert_eq!(made, names, "row {i}"),
            (Err(e), Err(start)) => assert!(e.to_string().starts_with(start) && e.to_string().len() < 400, "row {i}: {e}"),
            (result, expected) => panic!("row {i}: {result:?}, not {expected:?}"),
        }
    }
    // Nested deeper than any path may be, one folder an entry.
    let mut nested = String::new();
    let mut tar = t();
    while nested.len() < 6000 {
        nested += &("d".repeat(40) + "/");
        tar = tar.folder(&nested);
    }
    assert!(attack(&tar.end()).unwrap_err().to_string().contains("4,096"));
    // The same through a symlink, where no single name is long.
    let half = ("d".repeat(40) + "/").repeat(60);
    let tar = t().folder(&half).symlink("s", &half).file(&format!("s/{half}x"));
    assert!(attack(&tar.end()).unwrap_err().to_string().contains("4,096"));
    let deep = "d/".repeat(100_000);
    assert!(attack(&t().folder(&deep).end()).is_err());
}

#[test]
fn damaged_streams_are_errors() {
    let good = Tar::default().file("a").end();
    let gzip = {
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, &good).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = zstd::encode_all(&good[..], 1).unwrap();
    // Several members count as one stream.
    let two = [&gzip_of(&good[..700])[..], &gzip_of(&good[700..])].concat();
    let frames = [zstd::encode_all(&good[..700], 1).unwrap(), zstd::encode_all(&good[700..], 1).unwrap()].concat();
    for whole in [&good, &gzip, &zstd, &two, &frames] {
        assert_eq!(attack(whole).unwrap(), ["a"]);
        let dir = tempfile::tempdir().unwrap();
        unpack(&whole[..], dir.path(), Some(&Digest::of(&good)), Ownership::Real, &no_lower).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let error = unpack(&whole[..], dir.path(), Some(&Digest::of(b"")), Ownership::Real, &no_lower).unwrap_err();
        assert!(matches!(error, LayerError::Mismatch { actual, .. } if actual == Digest::of(&good)));
    }
    assert!(attack(&[]).unwrap().is_empty(), "an empty stream has no entries");
    for cut in [1, 100, 511, 513, 800] {
        assert!(matches!(attack(&good[..cut]), Err(LayerError::Malformed { .. })), "{cut}");
    }
    for bytes in [&gzip[..gzip.len() - 9], &zstd[..zstd.len() - 9], &two[..two.len() - 1], b"\x1f\x8bnonsense", &[7; 2000]] {
        assert!(matches!(attack(bytes), Err(LayerError::Malformed { .. })));
    }
    let mut flipped = good.clone();
    flipped[0] ^= 1;
    assert!(attack(&flipped).unwrap_err().to_string().contains("checksum"));
    // What follows the end of the archive is part of the digest.
    let padded = [&good[..], &[0; 10240]].concat();
    let dir = tempfile::tempdir().unwrap();
    unpack(&padded[..], dir.path(), Some(&Digest::of(&padded)), Ownership::Real, &no_lower).unwrap();
}

fn gzip_of(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn whiteouts_become_overlay_marks() {
    let t = Tar::default;
    let rows: Vec<(Tar, &[(&str, &str)])> = vec![
        (t().file(".wh.x"), &[("x", "whiteout")]),
        (t().file("x").file(".wh.x"), &[("x", "whiteout")]),
        (t().file("x/y").file(".wh.x"), &[("x", "whiteout")]),
        (t().file(".wh.x").file("x"), &[("x", "RegularFile")]),
        (t().file(".wh.x").folder("x/"), &[("x", "opaque")]),
        (t().file(".wh.x").file("x/y"), &[("x", "opaque"), ("x/y", "RegularFile")]),
        (t().folder("x").file("x/y").file("x/.wh..wh..opq"), &[("x", "opaque"), ("x/y", "RegularFile")]),
        (t().file("x/.wh..wh..opq"), &[("x", "opaque")]),
        (t().folder("x").folder("x"), &[("x", "Directory")]),
        (t().with(|_| {}, "x", Kind::Char, ""), &[("x", "whiteout")]),
        (t().with(|h| h.xattrs = vec![(b"user.overlay.opaque".to_vec(), b"y".to_vec())], "x", Kind::Directory, ""), &[("x", "Directory")]),
    ];
    for (i, (tar, expected)) in rows.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        unpack(&tar.end()[..], dir.path(), None, Ownership::Real, &no_lower).unwrap();
        let got: Vec<_> = describe(dir.path())
            .into_iter()
            .map(|(name, line)| {
                let kind = if line.contains("user.overlay.opaque=[121]") { "opaque" } else { line.split(' ').next().unwrap_or_default() };
                (name, kind.to_owned())
            })
            .collect();
        let expected: Vec<_> = expected.iter().map(|(n, k)| ((*n).to_owned(), (*k).to_owned())).collect();
        assert_eq!(got, expected, "row {i}");
    }
    // In an ordinary archive they are names like others.
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("x"), "old").unwrap();
    extract(&t().file(".wh.x").file("x").end()[..], dir.path(), Ownership::Real).unwrap();
    assert_eq!(describe(dir.path()).into_keys().collect::<Vec<_>>(), [".wh.x", "x"]);
    assert_eq!(fs::read(dir.path().join("x")).unwrap(), b"new");
    assert!(extract(&t().with(|_| {}, "x", Kind::Char, "").end()[..], dir.path(), Ownership::Real).is_err());
}

#[test]
fn the_layers_below_count() {
    let place = Place::new();
    let (below, dir) = (place.folder("below"), place.folder("dir"));
    fs::create_dir_all(below.join("usr/lib")).unwrap();
    fs::set_permissions(below.join("usr"), fs::Permissions::from_mode(0o1711)).unwrap();
    setxattr(&below.join("usr"), "user.note", b"kept");
    setxattr(&below.join("usr"), "user.overlay.opaque", b"y");
    fs::write(below.join("usr/lib/a.so"), "library").unwrap();
    fs::set_permissions(below.join("usr/lib/a.so"), fs::Permissions::from_mode(0o4711)).unwrap();
    symlink("usr/lib", below.join("lib")).unwrap();
    let with = |path: &Path, owner| Some(Lower { path: below.join(path), owner }).filter(|l| l.path.symlink_metadata().is_ok());
    let lower = |path: &Path| with(path, None);
    let tar = Tar::default().file("lib/b.so").link("usr/lib/c.so", "lib/a.so").end();
    unpack(&tar[..], &dir, None, Ownership::Real, &lower).unwrap();
    let got = describe(&dir);
    assert_eq!(got.keys().collect::<Vec<_>>(), ["usr", "usr/lib", "usr/lib/b.so", "usr/lib/c.so"], "the lower symlink leads the way");
    assert!(got["usr"].starts_with("Directory 1711 ") && got["usr"].ends_with(" user.note=[107, 101, 112, 116]"), "{}", got["usr"]);
    assert_eq!(got["usr/lib/c.so"], describe(&below)["usr/lib/a.so"], "a link to a lower file is a copy");
    assert_eq!(fs::metadata(below.join("usr/lib/a.so")).unwrap().nlink(), 1);
    // Where the disk holds one id, what the layers below recorded counts.
    let owner = Owner { uid: 5, gid: 6, node: None };
    let lower = |path: &Path| with(path, Some(owner));
    let owners = unpack(&tar[..], &place.folder("recorded"), None, Ownership::Recorded, &lower).unwrap();
    let paths = ["usr", "usr/lib", "usr/lib/c.so"];
    assert_eq!(owners, paths.iter().map(|path| ((*path).into(), owner)).collect());
}

#[test]
fn permissions_whatever_the_umask() {
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let tar = Tar::default()
        .with(|h| (h.mode, h.mtime) = (0o2555, 1), "d/", Kind::Directory, "")
        .with(|h| (h.mode, h.mtime) = (0o6777, -5), "d/f", Kind::File, "x")
        .with(|h| (h.mode, h.mtime) = (0o622, 5_000_000_000), "d/p", Kind::Fifo, "")
        .file("e/implicit")
        .end();
    let dir = tempfile::tempdir().unwrap();
    unpack(&tar[..], dir.path(), None, Ownership::Real, &no_lower).unwrap();
    let got = describe(dir.path());
    let start =
        |name: &str| got[name].split(' ').enumerate().filter(|(i, _)| [1, 3].contains(i)).map(|(_, w)| w).collect::<Vec<_>>().join(" ");
    assert_eq!([start("d"), start("d/f"), start("d/p")], ["2555 1", "6777 -5", "622 5000000000"]);
    assert_eq!(start("e"), "755 0");
}

#[test]
fn what_gnu_tar_writes_is_read() {
    let place = Place::new();
    let root = place.folder("tree");
    let content: Vec<u8> = (0..9000u32).map(|n| n as u8).collect();
    let long = root.join("l".repeat(90)).join("m".repeat(90));
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join("file"), &content).unwrap();
    symlink("t".repeat(150), root.join("link")).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    for at in (0..40u64).map(|i| i * 100_000) {
        std::os::unix::fs::FileExt::write_all_at(&sparse, &content, at).unwrap();
    }
    sparse.set_len(5_000_000).unwrap();
    drop(sparse);
    let expected = describe(&root);
    let sets: [&[&str]; 7] = [
        &["--format=gnu"],
        &["--format=oldgnu", "--sparse"],
        &["--format=gnu", "--sparse"],
        &["--format=posix"],
        &["--format=posix", "--sparse", "--sparse-version=0.0"],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--sparse", "--sparse-version=1.0"],
    ];
    for options in sets {
        let output = match Command::new("tar").args(options).args(["-cf", "-", "-C"]).arg(&root).arg(".").output() {
            Ok(output) if output.status.success() => output.stdout,
            other => return eprintln!("skipped: no GNU tar here ({:?})", other.map(|o| o.status)),
        };
        let dir = tempfile::tempdir().unwrap();
        unpack(&output[..], dir.path(), None, Ownership::Real, &no_lower).unwrap();
        assert_eq!(describe(dir.path()), expected, "{options:?}");
        let mut reader = Reader::new(&output[..]);
        while let Some(header) = reader.next().unwrap() {
            let mut bytes = vec![];
            reader.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes.len() as u64, header.size, "{options:?}: holes read as zeros");
        }
    }
}

#[derive(Debug, Clone)]
enum Node {
    File { size: usize, mode: u32, xattr: Option<Vec<u8>> },
    Folder { mode: u32, opaque: bool },
    Symlink(String),
    Link(usize),
    Whiteout,
    Fifo,
}

fn node() -> impl Strategy<Value = Node> {
    let size = prop_oneof![Just(0usize), 1..2000usize, Just(512), Just(1_048_576), Just(1_100_000)];
    prop_oneof![
        4 => (size, 0..0o10000u32, proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200)))
            .prop_map(|(size, mode, xattr)| Node::File { size, mode, xattr }),
        3 => (0..0o10000u32, any::<bool>()).prop_map(|(mode, opaque)| Node::Folder { mode, opaque }),
        1 => "[a-z/.]{1,120}".prop_map(Node::Symlink),
        2 => (0..30usize).prop_map(Node::Link),
        1 => Just(Node::Whiteout),
        1 => Just(Node::Fifo),
    ]
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![4 => "[ab]", 1 => "[a-c.+ -]{1,3}", 1 => "[é漢a]{1,40}", 1 => "x{60,110}"]
        .prop_filter("not a name", |n| n != "." && n != ".." && !n.starts_with(".wh."))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_packed_tree_comes_back(entries in proptest::collection::vec((proptest::collection::vec(name(), 1..4), node(), 0..2_000_000_000i64), 0..30), pick in 0..3usize) {
        if !is_root() {
            return Ok(());
        }
        let place = Place::new();
        let root = place.folder("root");
        let mut files = vec![];
        let mut folders = vec![];
        for (parts, node, mtime) in &entries {
            let path = root.join(parts.join("/"));
            if path.parent().is_some_and(|p| fs::create_dir_all(p).is_err()) || path.symlink_metadata().is_ok() {
                continue;
            }
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(*mtime as u64);
            match node {
                Node::File { size, mode, xattr } => {
                    fs::write(&path, vec![b'z'; *size]).unwrap();
                    if let Some(value) = xattr {
                        setxattr(&path, "user.test", value);
                    }
                    fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).unwrap();
                    fs::File::open(&path).unwrap().set_modified(time).unwrap();
                    files.push(path);
                }
                Node::Folder { mode, opaque } => {
                    fs::create_dir(&path).unwrap();
                    if *opaque {
                        setxattr(&path, "user.overlay.opaque", b"y");
                    }
                    folders.push((path, *mode, time));
                }
                Node::Symlink(target) => symlink(target, &path).unwrap(),
                Node::Link(index) if !files.is_empty() => fs::hard_link(&files[index % files.len()], &path).unwrap(),
                Node::Link(_) => {}
                Node::Whiteout => mknod(&path, FileType::CharacterDevice, 0, 0, 0),
                Node::Fifo => mknod(&path, FileType::Fifo, 0o600, 0, 0),
            }
        }
        for (path, mode, time) in folders {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            fs::File::open(&path).unwrap().set_modified(time).unwrap();
        }
        let compression = [Compression::None, Compression::Gzip(1), Compression::Zstd(1)][pick];
        let options = PackOptions { compression, mtime: None, threads: 2 };
        let packed = pack(&root, &Owners::new(), &options, &place.store).unwrap();
        let back = place.folder("back");
        let blob = place.store.open_blob(&packed.digest).unwrap();
        let owners = unpack(blob, &back, Some(&packed.diff_id), Ownership::Real, &no_lower).unwrap();
        prop_assert_eq!(describe(&root), describe(&back));
        prop_assert_eq!(pack(&back, &owners, &PackOptions { threads: 1, ..options }, &place.store).unwrap(), packed);
    }

    #[test]
    fn noise_never_panics_nor_escapes(mut bytes in proptest::collection::vec(any::<u8>(), 0..1500), header in any::<bool>(), at in 0..512usize, byte in any::<u8>()) {
        if header {
            let mut tar = Tar::default().folder("d/").symlink("d/s", "../..").file("d/s/f").end();
            tar[at + 512 * (bytes.len() % 3)] = byte;
            bytes = tar;
        }
        let _ = attack(&bytes);
    }
}
