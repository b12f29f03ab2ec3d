//! Rows of `base | context | instruction | what the new diff folder holds`.
//!
//! Entries of a tree: `d/` folder, `f=text` file, `l->target` link, `p|` pipe, `c%1,3` device; then `@mode` (else 755 and 644)
//! and `#uid:gid` (else 0:0). In a diff, `d/!` is opaque.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::layer::{Owners, Ownership};

use super::*;
use crate::ops::content;
use crate::ops::merged;
use crate::snapshot::LayerDir;
use crate::snapshot::folder::Folder;
use crate::snapshot::stat_cache::{FileStatCache, NoStatCache};
use crate::snapshot::tree::{Entry, walk};
use crate::snapshot::view::View;

const OLD: i64 = 1_000_000_000;

/// Makes a tree; every time in it is [`OLD`].
fn make(dir: &Path, spec: &str) {
    fs::create_dir_all(dir).unwrap();
    let mut entries: Vec<&str> = spec.split_whitespace().collect();
    entries.sort_by_key(|e| e.find(['=', '@', '#', '|', '%']).unwrap_or(e.len()));
    let mut finish = vec![(dir.to_owned(), 0o755, (0, 0), false)];
    for entry in &entries {
        let (entry, owner) = entry.split_once('#').unwrap_or((entry, "0:0"));
        let (entry, mode) = entry.split_once('@').unwrap_or((entry, ""));
        let mode = u32::from_str_radix(mode, 8).unwrap_or(if entry.ends_with('/') { 0o755 } else { 0o644 });
        let (uid, gid) = owner.split_once(':').unwrap();
        let owner = (uid.parse().unwrap(), gid.parse().unwrap());
        let path;
        let parents = |path: &Path, finish: &mut Vec<(PathBuf, u32, (u32, u32), bool)>| {
            let parent = path.parent().unwrap();
            for ancestor in parent.ancestors().filter(|a| a.starts_with(dir) && !a.exists()) {
                finish.push((ancestor.to_owned(), 0o755, (0, 0), false));
            }
            fs::create_dir_all(parent).unwrap();
        };
        let mut link = false;
        if let Some((name, target)) = entry.split_once("->") {
            path = dir.join(name);
            parents(&path, &mut finish);
            symlink(target, &path).unwrap();
            link = true;
        } else if let Some((name, text)) = entry.split_once('=') {
            path = dir.join(name);
            parents(&path, &mut finish);
            if let Some(first) = text.strip_prefix("link:") {
                fs::hard_link(dir.join(first), &path).unwrap();
                continue;
            }
            fs::write(&path, text).unwrap();
        } else if let Some(name) = entry.strip_suffix('|') {
            path = dir.join(name);
            parents(&path, &mut finish);
            rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o644.into(), 0).unwrap();
        } else if let Some((name, numbers)) = entry.split_once('%') {
            path = dir.join(name);
            parents(&path, &mut finish);
            let (major, minor) = numbers.split_once(',').unwrap();
            let device = rustix::fs::makedev(major.parse().unwrap(), minor.parse().unwrap());
            rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::CharacterDevice, 0o644.into(), device).unwrap();
        } else {
            path = dir.join(entry.trim_end_matches('/'));
            parents(&path, &mut finish);
            fs::create_dir_all(&path).unwrap();
        }
        finish.push((path, mode, owner, link));
    }
    for (path, mode, (uid, gid), link) in finish.iter().rev() {
        std::os::unix::fs::lchown(path, Some(*uid), Some(*gid)).unwrap();
        if !link {
            fs::set_permissions(path, fs::Permissions::from_mode(*mode)).unwrap();
        }
        let time = rustix::fs::Timespec { tv_sec: OLD, tv_nsec: 5 };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn show_entry(path: &str, entry: &Entry, content: impl FnOnce() -> String) -> String {
    let (mut text, mode) = match entry.kind {
        Kind::Dir => (format!("{path}/"), 0o755),
        Kind::File => (format!("{path}={}", content()), 0o644),
        Kind::Symlink => (format!("{path}->{}", content()), 0o777),
        Kind::Fifo => (format!("{path}|"), 0o644),
        Kind::Char(major, minor) => (format!("{path}%{major},{minor}"), 0o644),
        other => (format!("{path}?{other:?}"), 0),
    };
    if entry.mode != mode {
        write!(text, "@{:o}", entry.mode).unwrap();
    }
    if (entry.uid, entry.gid) != (0, 0) {
        write!(text, "#{}:{}", entry.uid, entry.gid).unwrap();
    }
    text
}

/// Every entry but the root, as a spec.
fn show(tree: &dyn Tree) -> String {
    let mut all = Vec::new();
    for visit in walk(tree, Path::new("")).skip(1) {
        let visit = visit.unwrap();
        let location = tree.locate(&visit.path).unwrap().unwrap();
        let mut text = show_entry(visit.path.to_str().unwrap(), &visit.entry, || match visit.entry.kind {
            Kind::Symlink => location.read_link().unwrap().display().to_string(),
            _ => String::from_utf8_lossy(&fs::read(location.magic_path()).unwrap()).into_owned(),
        });
        if visit.entry.is_dir() && rustix::fs::lgetxattr(location.magic_path(), "user.overlay.opaque", &mut [0u8; 4]).is_ok() {
            text.insert(text.find('/').map_or(0, |_| visit.path.as_os_str().len() + 1), '!');
        }
        all.push(text);
    }
    all.join(" ")
}

/// A folder as it is on disk, with real owners.
fn raw(dir: impl Into<PathBuf>) -> Folder {
    Folder::new(dir, Patterns::default()).with_owners()
}

struct Ran {
    dir: tempfile::TempDir,
    result: Result<Owners, FileError>,
}

impl Ran {
    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }
    fn text(&self) -> String {
        match &self.result {
            Ok(_) => show(&raw(self.out())),
            Err(error) => format!("error: {error}"),
        }
    }
}

/// Parses `COPY --flag=… source… dest`; more instructions after `;`.
fn parse(line: &str) -> (Vec<FileAction>, String) {
    let mut ignore = String::new();
    let mut actions = Vec::new();
    for line in line.split(';') {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        let verb = words.remove(0);
        let mut flags: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        while let Some(flag) = words.first().and_then(|w| w.strip_prefix("--")) {
            let (name, value) = flag.split_once('=').unwrap_or((flag, ""));
            flags.entry(name).or_default().push(value.to_owned());
            words.remove(0);
        }
        let one = |name: &str| flags.get(name).map(|v| v[0].clone());
        if let Some(lines) = flags.get("ignore") {
            ignore = lines.join("\n");
        }
        let dest = words.pop().unwrap().to_owned();
        actions.push(match verb {
            "WORKDIR" => FileAction::Mkdir { path: dest, owner: one("user") },
            "FILE" => {
                FileAction::Inline { name: words[0].into(), content: words[1].into(), dest, chown: one("chown"), chmod: one("chmod") }
            }
            _ => FileAction::Copy(CopyAction {
                from: 0,
                sources: words.iter().map(|w| (*w).to_owned()).collect(),
                dest,
                chown: one("chown"),
                chmod: one("chmod"),
                parents: flags.contains_key("parents"),
                excludes: flags.get("exclude").cloned().unwrap_or_default(),
                unpack: verb == "ADD",
                keep_owner: flags.contains_key("from"),
                default_mode: one("default").map(|m| u32::from_str_radix(&m, 8).unwrap()),
            }),
        });
    }
    (actions, ignore)
}

fn snapshot(dirs: impl IntoIterator<Item = PathBuf>) -> Snapshot {
    Snapshot { layers: dirs.into_iter().map(|dir| Arc::new(LayerDir::new(dir, Owners::new()))).collect() }
}

fn run_with(base: &str, context: &str, line: &str, ownership: Ownership) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let layers: Vec<PathBuf> = base
        .split('~')
        .enumerate()
        .filter(|(_, spec)| !spec.trim().is_empty())
        .map(|(at, spec)| {
            let layer = dir.path().join(format!("layer{at}"));
            make(&layer, spec);
            layer
        })
        .collect();
    let ctx = dir.path().join("context");
    make(&ctx, context);
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    let (actions, ignore) = parse(line);
    let from_image = actions.iter().any(|a| matches!(a, FileAction::Copy(c) if c.keep_owner));
    let tree: Arc<dyn Tree> =
        if from_image { Arc::new(View::new(&snapshot([ctx]))) } else { Arc::new(Folder::new(ctx, Patterns::parse(&ignore).unwrap())) };
    let result = apply(&FileOp { base: None, actions }, &snapshot(layers), &|_| Ok(tree.clone()), &out, ownership, None);
    Ran { dir, result }
}

fn run(base: &str, context: &str, line: &str) -> Ran {
    run_with(base, context, line, Ownership::Real)
}

/// Root only: the rows make owners and devices.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: not root");
    }
    root
}

fn check(rows: &[(&str, &str, &str, &str)]) {
    if !is_root() {
        return;
    }
    let mut wrong = Vec::new();
    for (base, context, line, expect) in rows {
        let got = run(base, context, line).text();
        let fits = if expect.starts_with("error: ") { got.starts_with(expect) } else { got == *expect };
        if !fits {
            wrong.push(format!("base    {base}\ncontext {context}\n{line}\nexpect  {expect}\ngot     {got}\n"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} rows:\n{}", wrong.len(), rows.len(), wrong.join("\n"));
}

#[test]
fn destinations() {
    check(&[
        // base, context, instruction, diff
        ("", "a=1", "COPY a /b", "b=1"),
        ("", "a=1", "COPY a /", "a=1"),
        ("", "a=1", "COPY a .", "a=1"),
        ("", "a=1", "COPY a /x/", "x/ x/a=1"),
        ("", "a=1", "COPY a /x/y/z", "x/ x/y/ x/y/z=1"),
        ("", "a=1", "COPY a /x/y/", "x/ x/y/ x/y/a=1"),
        ("", "a=1", "COPY a /x/.", "x/ x/a=1"),
        ("", "a=1", "COPY /a //x//y", "x/ x/y=1"),
        ("", "a=1", "COPY ./a /x/../y", "y=1"),
        ("", "a=1", "COPY ../../a /../../b", "b=1"),
        ("x/", "a=1", "COPY a /x", "x/ x/a=1"),
        ("x/", "a=1", "COPY a /x/b", "x/ x/b=1"),
        ("x=0", "a=1", "COPY a /x", "x=1"),
        ("x/a=0 x/b=0", "a=1", "COPY a /x/", "x/ x/a=1"),
        ("x=0", "a=1", "COPY a /x/", "error: cannot copy to non-directory: \"/x\""),
        ("x=0", "a=1", "COPY a /x/y", "error: cannot copy to non-directory: \"/x\""),
        ("x/a/", "a=1", "COPY a /x/", "error: cannot replace the folder \"/x/a\" with a file"),
        ("", "a=1 b=2", "COPY a b /x/", "x/ x/a=1 x/b=2"),
        ("x/ y/", "a=1 b=2", "COPY a b /x", "x/ x/a=1 x/b=2"),
        ("", "d/a=1 d/s/b=2", "COPY d /x", "x/ x/a=1 x/s/ x/s/b=2"),
        ("", "d/a=1 d/s/b=2", "COPY d /x/", "x/ x/a=1 x/s/ x/s/b=2"),
        ("", "d/a=1 d/s/b=2", "COPY d/ /x", "x/ x/a=1 x/s/ x/s/b=2"),
        ("", "d/a=1 d/s/b=2", "COPY d/. /x", "x/ x/a=1 x/s/ x/s/b=2"),
        ("", "d/a=1 d/s/b=2", "COPY d /", "a=1 s/ s/b=2"),
        ("", "d/a=1", "COPY . /x", "x/ x/d/ x/d/a=1"),
        ("", "d/a=1", "COPY / /x", "x/ x/d/ x/d/a=1"),
        ("x/y=0", "d/a=1", "COPY d /x", "x/ x/a=1"),
        ("x=0", "d/a=1", "COPY d /x", "error: cannot copy to non-directory: \"/x\""),
        ("x/s=0", "d/s/b=1", "COPY d /x", "error: cannot copy to non-directory: \"/x/s\""),
        ("x/s/", "d/s=1", "COPY d /x", "error: cannot replace the folder \"/x/s\" with a file"),
        ("", "d/a=1 e/b=2", "COPY d e /x/", "x/ x/a=1 x/b=2"),
        ("", "d/a=1 b=2", "COPY d b /x/", "x/ x/a=1 x/b=2"),
        ("", "d/", "COPY d /x", "x/"),
        ("", "", "COPY . /x", "x/"),
        ("", "d/a=1 e/a=2", "COPY d /x ; COPY e /x", "x/ x/a=2"),
        ("", "a=1 b=2", "COPY [ab] /x", "x=2"),
        ("", "a=1 d/b=2", "COPY [ad] /x", "error: cannot copy to non-directory: \"/x\""),
        ("", "a=1 b=2", "COPY a /x ; COPY b /x", "error: when using COPY or ADD with more than one source file"),
        ("x/", "a=1 b=2", "COPY a /x ; COPY b /x", "x/ x/a=1 x/b=2"),
        // Links of the destination stay in the root.
        ("real/ link->real", "a=1", "COPY a /link/", "real/ real/a=1"),
        ("real/ link->/real", "a=1", "COPY a /link/b", "real/ real/b=1"),
        ("real/ link->../../../real", "a=1", "COPY a /link/", "real/ real/a=1"),
        ("real/ link->real", "d/a=1", "COPY d /link", "real/ real/a=1"),
        ("real/ link->/../real", "d/a=1", "COPY d /link/s", "real/ real/s/ real/s/a=1"),
        ("f=0 link->f", "a=1", "COPY a /link", "f=1"),
        ("link->gone", "a=1", "COPY a /link", "gone=1"),
        ("link->gone/deep", "a=1", "COPY a /link/", "gone/ gone/deep/ gone/deep/a=1"),
        ("a->b b->a", "f=1", "COPY f /a", "error: \"/a\": too many levels of symbolic links"),
        ("x/l->/etc x/y/ etc/", "d/l/f=1", "COPY d /x", "error: cannot copy to non-directory: \"/x/l\""),
        ("x/f->/etc/passwd etc/passwd=r", "d/f=1", "COPY d /x", "x/ x/f=1"),
        ("x/f->/etc/passwd etc/passwd=r", "f=1", "COPY f /x/", "x/ x/f=1"),
        ("x/f->/etc/passwd etc/passwd=r", "f=1", "COPY f /x/f", "etc/ etc/passwd=1"),
    ]);
}

#[test]
fn copied_up_folders_keep_what_the_base_says() {
    check(&[
        ("a/b/c=0 a/@700#5:6 a/b/@1777#7:8", "f=1", "COPY f /a/b/", "a/@700#5:6 a/b/@1777#7:8 a/b/f=1"),
        ("a/@750~a/x=0 a/@711#1:1", "f=1", "COPY f /a/", "a/@711#1:1 a/f=1"),
        ("a/@750", "d/f=1 d/@700", "COPY d /a", "a/@750 a/f=1"),
        // Folders below the copied one get what the source says.
        ("a/s/x=0 a/s/@700#3:3", "d/s/f=1 d/s/@711", "COPY d /a", "a/ a/s/@711 a/s/f=1"),
        // The copied folder itself is made 0755.
        ("", "d/f=1 d/@700", "COPY d /a", "a/ a/f=1"),
        ("", "d/s/f=1 d/s/@700", "COPY d /a", "a/ a/s/@700 a/s/f=1"),
        ("t/@1777", "f=1", "COPY f /t/x/", "t/@1777 t/x/ t/x/f=1"),
    ]);
    if !is_root() {
        return;
    }
    let ran = run("a/b/x=0", "d/s/f=1 g=1", "COPY d /a/b ; COPY g /new/");
    ran.result.as_ref().unwrap();
    let time = |path: &str| {
        let meta = fs::symlink_metadata(ran.out().join(path)).unwrap();
        (meta.mtime(), meta.mtime_nsec())
    };
    for path in ["", "a", "a/b", "a/b/s", "a/b/s/f", "new/g"] {
        assert_eq!(time(path), (OLD, 5), "{path}");
    }
    assert!(time("new").0 > OLD);
}

#[test]
fn sources() {
    check(&[
        ("", "a=1", "COPY b /", "error: \"/b\": not found"),
        ("", "d/a=1", "COPY d/b /", "error: \"/d/b\": not found"),
        ("", "a=1", "COPY a/b /", "error: \"/a/b\": not found"),
        ("", "a=1", "COPY ../x/../b /", "error: \"/b\": not found"),
        ("", "a=1", "COPY x* /", ""),
        ("", "a=1", "COPY x* /d/", ""),
        ("", "a=1", "COPY x/y* /d/", "error: \"/x\": not found"),
        ("", "a=1", "COPY a x* /", "a=1"),
        ("", "a=1", "COPY [ /", "error: pattern \"[\""),
        ("", "a1=1 a2=2 b=3", "COPY a* /x/", "x/ x/a1=1 x/a2=2"),
        ("", "a1=1 a22=2", "COPY a? /x/", "x/ x/a1=1"),
        ("", "a1=1 a2=2 a3=3", "COPY a[12] /x/", "x/ x/a1=1 x/a2=2"),
        ("", "a1=1 a2=2 a3=3", "COPY a[^12] /x/", "x/ x/a3=3"),
        ("", "d/a=1 e/a=2 e/b=3", "COPY */a /x/", "x/ x/a=2"),
        ("", "d/a=1 d/s/b=2", "COPY d/* /x/", "x/ x/a=1 x/b=2"),
        ("", "d/a=1 e/b=2 c=3", "COPY * /x/", "x/ x/a=1 x/b=2 x/c=3"),
        ("", "d/s/a=1 d/t/b=2", "COPY d/*/* /x/", "x/ x/a=1 x/b=2"),
        ("", "a=1", "COPY a* /b", "b=1"),
        ("", ".h=1 v=2", "COPY * /x/", "x/ x/.h=1 x/v=2"),
        ("", "a[0]=1 a0=2", "COPY a[[]0] /x/", "x/ x/a[0]=1"),
        ("", "a*=1 ab=2", "COPY a\\* /x/", "x/ x/a*=1"),
        // Links: the last component and those on the way are followed, those inside folders are kept.
        ("", "f=1 l->f", "COPY l /x", "x=1"),
        ("", "f=1 l->f", "COPY l /x/", "x/ x/l=1"),
        ("", "d/f=1 l->d", "COPY l/f /x", "x=1"),
        ("", "d/f=1 l->d", "COPY l /x", "x/ x/f=1"),
        ("", "d/f=1 l->/d", "COPY l /x", "x/ x/f=1"),
        ("", "d/f=1 s/l->../../../../d", "COPY s/l /x", "x/ x/f=1"),
        ("", "d/f=1 d/l->f d/m->/etc/passwd d/n->gone", "COPY d /x", "x/ x/f=1 x/l->f x/m->/etc/passwd x/n->gone"),
        ("", "l->gone", "COPY l /x", "error: \"/l\": not found"),
        ("", "l->/etc/passwd", "COPY l /x", "error: \"/l\": not found"),
        ("", "f=1 l1->f", "COPY l* /x/", "x/ x/l1=1"),
        ("", "l->m m->l", "COPY l /x", "error: \"/l\": too many levels"),
        // What else there is.
        ("", "d/p|", "COPY d /x", "x/ x/p|"),
        ("", "d/c%1,3", "COPY d /x", "x/ x/c%1,3"),
        ("", "f=1@4755", "COPY f /x", "x=1@4755"),
        ("", "f=1@2711#5:5", "COPY f /x", "x=1@2711"),
        ("", "f=1@0", "COPY f /x", "x=1@0"),
        ("", "d/s/@2775", "COPY d /x", "x/ x/s/@2775"),
        ("", "f=1@600#5:6", "COPY --from f /x", "x=1@600#5:6"),
        ("", "d/s/f=1@6755#5:6 d/s/@1770#7:8 d/l->f", "COPY --from d /x", "x/ x/l->f x/s/@1770#7:8 x/s/f=1@6755#5:6"),
        ("", "f=1 g=2", "COPY f /x ; COPY [fg] /y", "x=1 y=2"),
    ]);
}

#[test]
fn ignored_files() {
    check(&[
        ("", "a=1 b=2", "COPY --ignore=b . /x", "x/ x/a=1"),
        ("", "a=1 b=2", "COPY --ignore=b b /x", "error: \"/b\": not found: it is there, but excluded by .dockerignore"),
        ("", "a=1 b=2", "COPY --ignore=b * /x/", "x/ x/a=1"),
        ("", "b=2", "COPY --ignore=b * /x/", ""),
        ("", "d/a=1 d/b=2", "COPY --ignore=d . /x", "x/"),
        ("", "d/a=1 d/b=2", "COPY --ignore=d --ignore=!d/b . /x", "x/ x/d/ x/d/b=2"),
        ("", "d/a=1 d/b=2", "COPY --ignore=d --ignore=!d/b d /x", "x/ x/b=2"),
        ("", "d/a=1 d/b=2 e=3", "COPY --ignore=d --ignore=!d/b * /x/", "x/ x/b=2 x/e=3"),
        ("", "d/a=1", "COPY --ignore=d d/a /x", "error: \"/d/a\": not found: it is there, but excluded"),
        ("", "a.o=1 s/b.o=2 s/c=3", "COPY --ignore=**/*.o . /x", "x/ x/s/ x/s/c=3"),
        ("", "a.o=1 s/b.o=2 s/c=3", "COPY --ignore=*.o . /x", "x/ x/s/ x/s/b.o=2 x/s/c=3"),
        ("", "f=1 l->f", "COPY --ignore=f l /x", "error: \"/l\": not found: it is there, but excluded"),
        ("", "f=1 l->f", "COPY --ignore=l l /x", "error: \"/l\": not found: it is there, but excluded"),
    ]);
}

#[test]
fn excludes_and_parents() {
    check(&[
        ("", "d/a=1 d/b.md=2", "COPY --exclude=*.md d /x", "x/ x/a=1"),
        ("", "d/a=1 d/s/b.md=2", "COPY --exclude=*.md d /x", "x/ x/a=1 x/s/ x/s/b.md=2"),
        ("", "d/a=1 d/s/b.md=2", "COPY --exclude=**/*.md d /x", "x/ x/a=1 x/s/"),
        ("", "d/a=1 d/s/b=2", "COPY --exclude=s d /x", "x/ x/a=1"),
        ("", "d/a=1 d/s/b=2 d/s/c=3", "COPY --exclude=s --exclude=!s/c d /x", "x/ x/a=1 x/s/ x/s/c=3"),
        ("", "a.txt=1 b.md=2", "COPY --exclude=*.md * /x/", "x/ x/a.txt=1"),
        ("", "d/a.txt=1 d/b.md=2", "COPY --exclude=*.md d/* /x/", "x/ x/a.txt=1"),
        ("", "a=1 b=2", "COPY --exclude=a --exclude=b . /x", "x/"),
        ("", "d/e/a=1 d/e/b=2", "COPY --parents d/e/a /x/", "x/ x/d/ x/d/e/ x/d/e/a=1"),
        ("", "d/e/a=1 f=2", "COPY --parents d/e/a f /x/", "x/ x/d/ x/d/e/ x/d/e/a=1 x/f=2"),
        ("", "d/e/a=1 d/e/b=2", "COPY --parents d/./e/a /x/", "x/ x/e/ x/e/a=1"),
        ("", "d/e/a=1 d/e/b=2", "COPY --parents ./d/e/a /x/", "x/ x/d/ x/d/e/ x/d/e/a=1"),
        ("", "d/e/a=1 d/f/a=2 d/f/b=3", "COPY --parents d/*/a /x/", "x/ x/d/ x/d/e/ x/d/e/a=1 x/d/f/ x/d/f/a=2"),
        ("", "d/e/a=1 d/f/a=2 d/f/b=3", "COPY --parents d/./*/a /x/", "x/ x/e/ x/e/a=1 x/f/ x/f/a=2"),
        ("", "d/e/a.c=1 d/b.c=2 d/c.h=3", "COPY --parents **/*.c /x/", "x/ x/d/ x/d/b.c=2 x/d/e/ x/d/e/a.c=1"),
        ("", "d/e/a=1 d/@700", "COPY --parents d/e /x/", "x/ x/d/@700 x/d/e/ x/d/e/a=1"),
        ("x/d/o=0", "d/e/a=1 d/@700", "COPY --parents d/e /x/", "x/ x/d/@700 x/d/e/ x/d/e/a=1"),
        ("", "d/e/a=1", "COPY --parents d/none /x/", "error: \"/d/none\": not found"),
        ("", "d/e/a=1", "COPY --parents d/none* /x/", "x/"),
        ("", "d/e/a=1 d/e/b=2", "COPY --parents --exclude=**/b d/e /x/", "x/ x/d/ x/d/e/ x/d/e/a=1"),
    ]);
}

#[test]
fn modes_and_owners() {
    check(&[
        ("", "f=1", "COPY --chmod=755 f /x", "x=1@755"),
        ("", "f=1@755", "COPY --chmod=0600 f /x/y/", "x/@600 x/y/@600 x/y/f=1@600"),
        ("", "d/f=1 d/s/", "COPY --chmod=700 d /x", "x/@700 x/f=1@700 x/s/@700"),
        ("x/", "d/f=1", "COPY --chmod=700 d /x", "x/ x/f=1@700"),
        ("", "d/f=1@600 d/s/@700 d/b=2@700", "COPY --chmod=u=rwX,go= d /x/y", "x/ x/y/ x/y/b=2@700 x/y/f=1@600 x/y/s/@700"),
        ("", "f=1", "COPY --chmod=+x f /x", "x=1@755"),
        ("", "f=1", "COPY --chmod=a-w f /x", "x=1@444"),
        ("", "f=1", "COPY --chmod=4755 f /x", "x=1@4755"),
        ("", "f=1", "COPY --chmod=rwx f /x", "error: --chmod=\"rwx\" is not a mode"),
        ("", "f=1", "COPY --chmod=99 f /x", "error: --chmod=\"99\" is not a mode"),
        ("", "d/l->f d/f=1", "COPY --chmod=600 d /x", "x/@600 x/f=1@600 x/l->f"),
        ("", "f=1", "COPY --chown=7 f /x", "x=1#7:7"),
        ("", "f=1", "COPY --chown=7:8 f /x/", "x/#7:8 x/f=1#7:8"),
        ("", "f=1", "COPY --chown=:8 f /x", "x=1#0:8"),
        ("", "f=1", "COPY --chown=7: f /x", "x=1#7:7"),
        ("", "d/f=1 d/l->f d/s/", "COPY --chown=7:8 d /x", "x/#7:8 x/f=1#7:8 x/l->f#7:8 x/s/#7:8"),
        ("x/", "d/f=1", "COPY --chown=7:8 d /x", "x/ x/f=1#7:8"),
        ("", "f=1@4755#3:3", "COPY --from --chown=7:8 f /x", "x=1@4755#7:8"),
        ("", "f=1", "COPY --chown=app f /x", "error: --chown=\"app\": the image's /etc/passwd has no entry \"app\""),
        ("", "f=1", "COPY --chown=0:wheel f /x", "error: --chown=\"0:wheel\": the image's /etc/group has no entry \"wheel\""),
        ("etc/passwd=app:x:1000:1001::/:/", "f=1", "COPY --chown=app f /x", "x=1#1000:1001"),
        ("etc/passwd=app:x:1000:1001::/:/ etc/group=app:x:55:", "f=1", "COPY --chown=app:app f /x", "x=1#1000:55"),
        ("p=app:x:1000:1001::/:/ etc/passwd->../p", "f=1", "COPY --chown=app:9 f /x", "x=1#1000:9"),
        ("", "f=1", "ADD --default=600 f /x", "x=1@600"),
        ("", "f=1", "ADD --default=600 --chmod=644 f /x", "x=1"),
        ("", "", "FILE n hello /x", "x=hello"),
        ("", "", "FILE n hello /x/", "x/ x/n=hello"),
        ("x/", "", "FILE n hello /x", "x/ x/n=hello"),
        ("", "", "FILE --chown=7:8 --chmod=700 n hello /x/y", "x/@700#7:8 x/y=hello@700#7:8"),
        ("", "", "FILE n one /x/ ; FILE n two /x/", "x/ x/n=two"),
        ("x=0", "", "FILE n one /x", "x=one"),
        ("", "", "WORKDIR /a/b", "a/ a/b/"),
        ("a/@700", "", "WORKDIR /a", ""),
        ("a/@700", "", "WORKDIR /a/b", "a/@700 a/b/"),
        ("", "", "WORKDIR --user=7 /a/b", "a/#7:7 a/b/#7:7"),
        ("etc/passwd=app:x:1000:1001::/:/", "", "WORKDIR --user=app /a", "a/#1000:1001"),
        ("", "", "WORKDIR --user=later /a", "a/"),
        ("r/ l->r", "", "WORKDIR /l/b", "r/ r/b/"),
        ("f=0", "", "WORKDIR /f", "error: cannot copy to non-directory: \"/f\""),
        ("f=0", "", "WORKDIR /f/g", "error: cannot copy to non-directory: \"/f\""),
    ]);
}

#[test]
fn one_id_records_what_the_disk_cannot_hold() {
    if !is_root() {
        return;
    }
    let ran = run_with("etc/", "d/f=1@4755#5:6 d/c%1,3 d/s/@700#7:8 d/g=2", "COPY --from d /etc", Ownership::Recorded);
    let owners = ran.result.as_ref().unwrap();
    let shown: Vec<String> = owners.iter().map(|(p, o)| format!("{} {}:{} {:?}", p.display(), o.uid, o.gid, o.node)).collect();
    assert_eq!(shown, ["etc/c 0:0 Some((8612, 1, 3))", "etc/f 5:6 None", "etc/s 7:8 None"]);
    let layer = Snapshot { layers: vec![Arc::new(LayerDir::new(ran.out(), owners.clone()))] };
    assert_eq!(show(&View::new(&layer)), "etc/ etc/c%1,3 etc/f=1@4755#5:6 etc/g=2 etc/s/@700#7:8");
}

#[test]
fn hard_links_count_within_one_source() {
    if !is_root() {
        return;
    }
    let inode = |ran: &Ran, path: &str| fs::metadata(ran.out().join(path)).unwrap().ino();
    for line in ["COPY d /x", "COPY --from d /x"] {
        let ran = run("", "d/a=1 d/b=link:d/a d/s/c=link:d/a d/o=1", line);
        ran.result.as_ref().unwrap();
        assert_eq!(inode(&ran, "x/a"), inode(&ran, "x/b"), "{line}");
        assert_eq!(inode(&ran, "x/a"), inode(&ran, "x/s/c"), "{line}");
        assert_ne!(inode(&ran, "x/a"), inode(&ran, "x/o"), "{line}");
        let ran = run("", "d/a=1 d/b=link:d/a", line.replace(" d ", " d/a d/b ").replace("/x", "/x/").as_str());
        ran.result.as_ref().unwrap();
        assert_ne!(inode(&ran, "x/a"), inode(&ran, "x/b"), "{line}, two sources");
    }
}

#[test]
fn a_copy_is_no_link_of_its_source() {
    if !is_root() {
        return;
    }
    for line in ["COPY a /x", "COPY --from a /x", "COPY --from d /y", "COPY --from a /x ; COPY --from a /y"] {
        let ran = run("", "a=1 d/b=1", line);
        ran.result.as_ref().unwrap();
        for visit in walk(&raw(ran.dir.path()), Path::new("")) {
            let visit = visit.unwrap();
            assert!(visit.entry.is_dir() || visit.entry.inode.2 == 1, "{line}: {:?} has {} links", visit.path, visit.entry.inode.2);
        }
    }
    // What is linked in the source has as many links in the copy.
    let ran = run("", "d/a=1 d/b=link:d/a d/c=1", "COPY --from d /x");
    let links = |path: &str| fs::metadata(ran.out().join(path)).unwrap().nlink();
    assert_eq!([links("x/a"), links("x/b"), links("x/c")], [2, 2, 1]);
    let ran = run("", "d/a=1 d/b=link:d/a", "COPY --from d/a /x");
    assert_eq!(fs::metadata(ran.out().join("x")).unwrap().nlink(), 1, "its other name is not copied");
}

#[test]
fn content_kinds_are_copied_whole() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (ctx, out) = (dir.path().join("c"), dir.path().join("o"));
    fs::create_dir_all(&ctx).unwrap();
    fs::create_dir(&out).unwrap();
    let big: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    fs::write(ctx.join("big"), &big).unwrap();
    let mut sparse = fs::File::create(ctx.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 32 << 20).unwrap();
    sparse.flush().unwrap();
    rustix::fs::setxattr(ctx.join("big"), "user.note", b"n", rustix::fs::XattrFlags::empty()).unwrap();
    let caps = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rustix::fs::setxattr(ctx.join("big"), "security.capability", &caps, rustix::fs::XattrFlags::empty()).unwrap();
    for n in 0..300 {
        fs::create_dir_all(ctx.join(format!("many/{}", n % 7))).unwrap();
        fs::write(ctx.join(format!("many/{}/{n}", n % 7)), n.to_string()).unwrap();
    }
    let (actions, _) = parse("COPY --chown=3:4 . /");
    let tree: Arc<dyn Tree> = Arc::new(Folder::new(&ctx, Patterns::default()));
    apply(&FileOp { base: None, actions }, &Snapshot::default(), &|_| Ok(tree.clone()), &out, Ownership::Real, None).unwrap();
    assert_eq!(fs::read(out.join("big")).unwrap(), big);
    let mut value = [0u8; 20];
    assert_eq!(rustix::fs::getxattr(out.join("big"), "security.capability", &mut value), Ok(20));
    assert_eq!(value, caps);
    assert_eq!(rustix::fs::getxattr(out.join("big"), "user.note", &mut value), Ok(1));
    let meta = fs::metadata(out.join("sparse")).unwrap();
    assert_eq!(meta.len(), 64 << 20);
    assert!(meta.blocks() < 4096, "{} blocks", meta.blocks());
    let mut middle = [0; 6];
    std::os::unix::fs::FileExt::read_exact_at(&fs::File::open(out.join("sparse")).unwrap(), &mut middle, 32 << 20).unwrap();
    assert_eq!(&middle, b"middle");
    for n in 0..300 {
        assert_eq!(fs::read_to_string(out.join(format!("many/{}/{n}", n % 7))).unwrap(), n.to_string());
    }
}

/// A context that changes after the walk has seen it.
struct Changing {
    tree: Folder,
    victim: PathBuf,
    then: fn(&Path),
}

impl Tree for Changing {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        self.tree.entry(path)
    }
    fn names(&self, dir: &Path) -> io::Result<Vec<std::ffi::OsString>> {
        self.tree.names(dir)
    }
    fn locate(&self, path: &Path) -> io::Result<Option<crate::snapshot::tree::Location>> {
        let found = self.tree.locate(path)?;
        if self.victim.ends_with(path) && !path.as_os_str().is_empty() {
            (self.then)(&self.victim);
        }
        Ok(found)
    }
}

#[test]
fn a_context_that_changes_is_named() {
    let changes: &[(&str, &str, fn(&Path))] = &[
        ("d/f=1", "d/f", |path| fs::remove_file(path).unwrap()),
        ("d/f=1", "d/f", |path| {
            fs::remove_file(path).unwrap();
            symlink("elsewhere", path).unwrap();
        }),
        ("d/f=1", "d/f", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        ("d/l->f d/f=1", "d/l", |path| fs::remove_file(path).unwrap()),
        ("d/l->f d/f=1", "d/l", |path| {
            fs::remove_file(path).unwrap();
            fs::write(path, "").unwrap();
        }),
    ];
    if !is_root() {
        return;
    }
    for (number, (context, victim, then)) in changes.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let (ctx, out) = (dir.path().join("context"), dir.path().join("out"));
        let (actions, _) = parse("COPY d /elsewhere/x");
        for keys in [true, false] {
            let _ = fs::remove_dir_all(&ctx);
            let _ = fs::remove_dir_all(&out);
            make(&ctx, context);
            fs::create_dir(&out).unwrap();
            let tree = Arc::new(Changing { tree: Folder::new(&ctx, Patterns::default()), victim: ctx.join(victim), then: *then });
            let error = if keys {
                let FileAction::Copy(copy) = &actions[0] else { panic!() };
                content::of_copy(&*tree, copy, &NoStatCache).map(drop).unwrap_err()
            } else {
                let op = FileOp { base: None, actions: actions.clone() };
                apply(&op, &Snapshot::default(), &|_| Ok(tree.clone()), &out, Ownership::Real, None).map(drop).unwrap_err()
            };
            let text = error.to_string();
            let named = text.contains(&format!("\"/{victim}\"")) && text.contains("the context changed while it was read");
            assert!(named && !text.contains("elsewhere"), "{number} {keys}: {text}");
        }
    }
}

/// A context with a folder that this user cannot list.
struct Locked {
    tree: Folder,
    locked: &'static Path,
}

impl Tree for Locked {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        self.tree.entry(path)
    }
    fn names(&self, dir: &Path) -> io::Result<Vec<std::ffi::OsString>> {
        if dir == self.locked { Err(rustix::io::Errno::ACCESS.into()) } else { self.tree.names(dir) }
    }
    fn locate(&self, path: &Path) -> io::Result<Option<crate::snapshot::tree::Location>> {
        self.tree.locate(path)
    }
}

#[test]
fn an_unreadable_folder_is_named() {
    if !is_root() {
        return;
    }
    for (locked, line) in [("locked", "COPY . /x"), ("a/locked", "COPY a /x"), ("a/locked", "COPY --parents . /x"), ("a", "COPY a/* /x")] {
        let dir = tempfile::tempdir().unwrap();
        make(&dir.path().join("context"), "locked/f=1 a/locked/f=1");
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let tree = Arc::new(Locked { tree: Folder::new(dir.path().join("context"), Patterns::default()), locked: Path::new(locked) });
        let (actions, _) = parse(line);
        let FileAction::Copy(copy) = &actions[0] else { panic!() };
        let key = content::of_copy(&*tree, copy, &NoStatCache).map(drop).unwrap_err().to_string();
        let op = FileOp { base: None, actions: actions.clone() };
        let copied =
            apply(&op, &Snapshot::default(), &|_| Ok(tree.clone()), &out, Ownership::Real, None).map(drop).unwrap_err().to_string();
        for text in [key, copied] {
            assert!(text.starts_with(&format!("cannot read \"/{locked}\": Permission denied")), "{line}: {text}");
        }
    }
}

fn tar_of(members: &[(&str, u8, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, kind, content) in members {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(tar::EntryType::new(*kind));
        header.set_mode(if *kind == b'5' { 0o750 } else { 0o640 });
        header.set_uid(11);
        header.set_gid(12);
        header.set_mtime(OLD as u64);
        let is_link = matches!(kind, b'1' | b'2');
        if is_link {
            header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
        }
        let data = if is_link { "" } else { content };
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn add(base: &str, archive: &[u8], line: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (ctx, lower, out) = (dir.path().join("c"), dir.path().join("l"), dir.path().join("out"));
    make(&ctx, "");
    make(&lower, base);
    fs::create_dir(&out).unwrap();
    fs::write(ctx.join("a.tar"), archive).unwrap();
    fs::set_permissions(ctx.join("a.tar"), fs::Permissions::from_mode(0o644)).unwrap();
    let (actions, _) = parse(line);
    let tree: Arc<dyn Tree> = Arc::new(Folder::new(&ctx, Patterns::default()));
    let layers = if base.is_empty() { vec![] } else { vec![lower] };
    let result = apply(&FileOp { base: None, actions }, &snapshot(layers), &|_| Ok(tree.clone()), &out, Ownership::Real, None);
    Ran { dir, result }.text()
}

#[test]
fn archives() {
    if !is_root() {
        return;
    }
    // base, members (name, type, content), instruction, diff
    type Row<'a> = (&'a str, &'a [(&'a str, u8, &'a str)], &'a str, &'a str);
    let rows: &[Row] = &[
        ("", &[("f", b'0', "1")], "ADD a.tar /x", "x/ x/f=1@640#11:12"),
        ("", &[("f", b'0', "1")], "ADD a.tar /", "f=1@640#11:12"),
        ("", &[("f", b'0', "1")], "ADD --chown=7:8 a.tar /x/", "x/#7:8 x/f=1@640#7:8"),
        ("", &[("f", b'0', "1")], "COPY a.tar /x", "x=TAR"),
        ("", &[("d/", b'5', ""), ("d/f", b'0', "1")], "ADD a.tar /x", "x/ x/d/@750#11:12 x/d/f=1@640#11:12"),
        ("", &[("d/e/f", b'0', "1")], "ADD a.tar /", "d/ d/e/ d/e/f=1@640#11:12"),
        ("", &[("./", b'5', ""), ("./f", b'0', "1")], "ADD a.tar /x", "x/ x/f=1@640#11:12"),
        ("", &[("/abs", b'0', "1")], "ADD a.tar /x", "x/ x/abs=1@640#11:12"),
        ("", &[("f", b'0', "1"), ("f", b'0', "2")], "ADD a.tar /", "f=2@640#11:12"),
        ("", &[("f", b'0', "1"), ("f/", b'5', "")], "ADD a.tar /", "f/@750#11:12"),
        ("", &[("d/f", b'0', "1"), ("d", b'0', "2")], "ADD a.tar /", "d=2@640#11:12"),
        ("", &[("a", b'0', "1"), ("b", b'1', "a")], "ADD a.tar /", "a=1@640#11:12 b=1@640#11:12"),
        ("a=0", &[("b", b'1', "a")], "ADD a.tar /", "a=0 b=0"),
        ("", &[("l", b'2', "/etc/passwd")], "ADD a.tar /", "l->/etc/passwd#11:12"),
        ("", &[(".wh.f", b'0', "1")], "ADD a.tar /x", "error: cannot put \"/x/.wh.f\" in an image"),
        ("", &[("p", b'6', "")], "ADD a.tar /", "p|@640#11:12"),
        // Over what the base has.
        ("f=0 d/o=0", &[("f", b'0', "1")], "ADD a.tar /", "f=1@640#11:12"),
        ("d/o=0", &[("d/", b'5', "")], "ADD a.tar /", "d/@750#11:12"),
        ("d/o=0", &[("d", b'0', "1")], "ADD a.tar /", "d=1@640#11:12"),
        ("f=0", &[("f/", b'5', "")], "ADD a.tar /", "f/!@750#11:12"),
        ("d/o=0", &[("d", b'0', "1"), ("d/", b'5', "")], "ADD a.tar /", "d/!@750#11:12"),
        ("r/ d->r", &[("d/f", b'0', "1")], "ADD a.tar /", "r/ r/f=1@640#11:12"),
        ("r/ d->r", &[("d/", b'5', "")], "ADD a.tar /", "d/!@750#11:12"),
        ("x/ etc/f=0 x/l->/etc", &[("l/f", b'0', "1")], "ADD a.tar /x", "x/ x/etc/ x/etc/f=1@640#11:12"),
        // Hostile.
        ("", &[("../f", b'0', "1")], "ADD a.tar /x", "error: cannot unpack \"/a.tar\": the name \"../f\" leaves the destination"),
        ("", &[("a/../../f", b'0', "1")], "ADD a.tar /x", "error: cannot unpack \"/a.tar\": the name \"a/../../f\" leaves"),
        ("", &[("l", b'2', "../../.."), ("l/f", b'0', "1")], "ADD a.tar /x", "x/ x/f=1@640#11:12 x/l->../../..#11:12"),
        ("", &[("l", b'2', "/"), ("l/f", b'0', "1")], "ADD a.tar /x", "x/ x/f=1@640#11:12 x/l->/#11:12"),
        ("", &[("h", b'1', "../../etc/passwd")], "ADD a.tar /x", "error: cannot unpack \"/a.tar\": the name \"../../etc/passwd\" leaves"),
        (
            "",
            &[("h", b'1', "gone")],
            "ADD a.tar /x",
            "error: cannot unpack \"/a.tar\": \"/h\" is a hard link to \"/gone\", which does not exist",
        ),
        ("", &[("d/", b'5', ""), ("h", b'1', "d")], "ADD a.tar /x", "error: cannot unpack \"/a.tar\": \"/h\" is a hard link to the folder"),
        ("", &[("f", b'0', "1"), ("f/g", b'0', "1")], "ADD a.tar /", "error: cannot copy to non-directory: \"/f\""),
        ("", &[("l", b'2', "l"), ("l/g", b'0', "1")], "ADD a.tar /", "error: \"/l/g\": too many levels"),
        ("", &[("z", b'Z', "")], "ADD a.tar /", "TARFILE"),
    ];
    let mut wrong = Vec::new();
    for (base, members, line, expect) in rows {
        let archive = tar_of(members);
        let text = String::from_utf8_lossy(&archive).into_owned();
        let got = add(base, &archive, line).replace(&text, "TAR").replace("a.tar=TAR", "TARFILE");
        let fits = if expect.starts_with("error: ") { got.starts_with(expect) } else { got == *expect };
        if !fits {
            wrong.push(format!("base   {base}\n{members:?}\n{line}\nexpect {expect}\ngot    {got}\n"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn archives_are_told_by_content() {
    if !is_root() {
        return;
    }
    let plain = tar_of(&[("f", b'0', "1")]);
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let (first, second) = plain.split_at(700);
    let members = [gzip(first), gzip(second)].concat();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(&plain).unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&plain).unwrap();
    for (what, bytes, expect) in [
        ("tar", plain.clone(), "x/ x/f=1@640#11:12"),
        ("gzip", gzip(&plain), "x/ x/f=1@640#11:12"),
        ("gzip in two members", members, "x/ x/f=1@640#11:12"),
        ("bzip2", bzip2.finish().unwrap(), "x/ x/f=1@640#11:12"),
        ("xz", xz.finish().unwrap(), "x/ x/f=1@640#11:12"),
        ("zstd", zstd::encode_all(&plain[..], 1).unwrap(), "x/ x/f=1@640#11:12"),
        ("text", b"no archive".to_vec(), "x=no archive"),
        ("empty", vec![], "x="),
        ("magic only", b"BZh".to_vec(), "x=BZh"),
        ("cut off", plain[..600].to_vec(), "error: cannot unpack \"/a.tar\":"),
    ] {
        let got = add("", &bytes, "ADD a.tar /x");
        assert!(if expect.starts_with("error") { got.starts_with(expect) } else { got == expect }, "{what}: {got}");
    }
    let got = add("", &gzip(b"text"), "ADD a.tar /x");
    assert!(!got.starts_with("error") && got.starts_with("x="), "gzip without a tar is copied: {got}");
}

fn key(context: &Path, line: &str) -> Result<String, FileError> {
    let (actions, ignore) = parse(line);
    let FileAction::Copy(copy) = &actions[0] else { panic!("{line}") };
    let tree: Box<dyn Tree> = if copy.keep_owner {
        Box::new(View::new(&snapshot([context.to_owned()])))
    } else {
        Box::new(Folder::new(context, Patterns::parse(&ignore).unwrap()))
    };
    content::of_copy(&*tree, copy, &NoStatCache).map(|contents| contents.digest.to_string())
}

#[test]
fn content_keys() {
    if !is_root() {
        return;
    }
    // context, instruction, other context, is the key the same?
    for (context, line, other, same) in [
        ("a=1", "COPY . /", "a=1", true),
        ("a=1", "COPY . /", "a=2", false),
        ("a=1", "COPY . /", "b=1", false),
        ("a=1", "COPY . /", "a=1@600", false),
        ("a=1", "COPY --chmod=644 . /", "a=1@600", true),
        ("a=1", "COPY --chmod=+x . /", "a=1@600", false),
        ("a=1#0:0", "COPY . /", "a=1#5:5", true),
        ("a=1#0:0", "COPY --from a /", "a=1#5:5", false),
        ("a=1#0:0", "COPY --from --chown=3 a /", "a=1#5:5", true),
        ("a=1 b=1", "COPY a /", "a=1 b=2", true),
        ("a=1 b=1", "COPY --ignore=b . /", "a=1 b=2", true),
        ("a=1 b=1", "COPY --exclude=b . /", "a=1 b=2", true),
        ("a1=1 b=1", "COPY a* /", "a1=1 b=2", true),
        ("a1=1", "COPY a* /", "a1=1 a2=1", false),
        ("a=x", "COPY . /", "a->x", false),
        ("a->x", "COPY . /", "a->y", false),
        ("f=1 g=1 l->f", "COPY l /", "f=1 g=1 l->g", true),
        ("d/a=1", "COPY d /", "d/a=1 d/b/", false),
        ("d/a=1", "COPY d /", "d/a=1 d/@700", true),
        ("d/s/a=1", "COPY d /", "d/s/a=1 d/s/@700", false),
        ("d/a=1 d/b=link:d/a", "COPY d /", "d/a=1 d/b=1", false),
        ("d/a=1 e/b=link:d/a", "COPY d /", "d/a=1 e/b=1", true),
        ("a=1 b=23", "COPY a b /x/", "a=12 b=3", false),
        ("a=1 b=1", "COPY a /x/", "a=1 b=1", true),
        ("d/e/a=1 d/b=1", "COPY --parents d/e/a /", "d/e/a=1 d/b=2", true),
        ("d/e/a=1", "COPY --parents d/e/a /", "d/e/a=1 d/e/@700", false),
        ("p|", "COPY . /", "p=", false),
        ("c%1,3", "COPY . /", "c%1,5", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        make(&dir.path().join("1"), context);
        make(&dir.path().join("2"), other);
        let (first, second) = (key(&dir.path().join("1"), line).unwrap(), key(&dir.path().join("2"), line).unwrap());
        assert_eq!(first == second, same, "{line}: {context} | {other}");
    }
    for (context, line, error) in [
        ("a=1", "COPY b /", "\"/b\": not found"),
        ("a=1", "COPY b/c* /", "\"/b\": not found"),
        ("a=1", "COPY --ignore=a a /", "\"/a\": not found: it is there, but excluded"),
        ("a/b=1", "COPY --parents a/c /", "\"/a/c\": not found"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), context);
        assert!(key(dir.path(), line).unwrap_err().to_string().starts_with(error), "{line}");
    }
}

#[test]
fn the_stat_cache_is_used_and_noticed() {
    let dir = tempfile::tempdir().unwrap();
    make(&dir.path().join("c"), "a=1");
    let (cache, copy) = (FileStatCache::new(dir.path().join("stat"), dir.path()), Path::new(""));
    let tree = Folder::new(dir.path().join("c"), Patterns::default());
    let before = content::of_path(&tree, copy, &cache).unwrap().digest;
    assert_eq!(content::of_path(&tree, copy, &cache).unwrap().digest, before);
    fs::write(dir.path().join("c/a"), "2").unwrap();
    assert_ne!(content::of_path(&tree, copy, &cache).unwrap().digest, before);
    assert!(matches!(content::of_path(&tree, Path::new("x"), &cache), Err(FileError::NotFound { .. })));
}

#[test]
fn in_place_changes_become_a_diff() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    make(&at("1"), "keep=1 gone=1 edit=1 mode=1 d/x=1 d/y/z=1 file=1 dir/q=1 dir/r=1 l->keep e/@700#4:4 e/f=1");
    let base = snapshot([at("1")]);
    for name in ["root", "out"] {
        fs::create_dir(at(name)).unwrap();
    }
    merged::materialize(&base, &at("root"), Ownership::Real).unwrap();
    assert_eq!(show(&raw(at("root"))), show(&raw(at("1"))));
    assert_ne!(fs::metadata(at("root/keep")).unwrap().ino(), fs::metadata(at("1/keep")).unwrap().ino(), "it will be written to");
    let before = merged::Index::of(&at("root")).unwrap();
    let root = at("root");
    fs::remove_file(root.join("gone")).unwrap();
    fs::write(root.join("edit"), "2").unwrap();
    fs::set_permissions(root.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_dir_all(root.join("d/y")).unwrap();
    fs::remove_file(root.join("file")).unwrap();
    fs::create_dir(root.join("file")).unwrap();
    fs::write(root.join("file/new"), "n").unwrap();
    fs::remove_dir_all(root.join("dir")).unwrap();
    fs::write(root.join("dir"), "now a file").unwrap();
    fs::write(root.join("e/g"), "g").unwrap();
    let owners = merged::diff(&before, &root, &at("out"), Owners::new(), Ownership::Real).unwrap();
    assert!(owners.is_empty());
    assert_eq!(show(&raw(at("out"))), "d/ d/y%0,0@0 dir=now a file e/@700#4:4 e/g=g edit=2 file/! file/new=n gone%0,0@0 mode=1@600");
    assert_eq!(show(&View::new(&snapshot([at("1"), at("out")]))), show(&raw(root)).replace("file/ ", "file/! "));
}

#[test]
fn a_snapshot_becomes_a_tar() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let long = format!("long/{}/f=1", "n".repeat(120));
    make(&dir.path().join("1"), &format!("a=1@4755#5:3000000 b=link:a d/x=1 l->a c%1,3 p| {long}"));
    make(&dir.path().join("2"), "d%0,0");
    let mut bytes = Vec::new();
    let base = snapshot([dir.path().join("1"), dir.path().join("2")]);
    merged::write_tar(&base, &mut bytes, Some(42)).unwrap();
    let mut archive = tar::Archive::new(&bytes[..]);
    let mut shown = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let pax: Vec<String> =
            entry.pax_extensions().unwrap().map(|p| p.map(|r| r.unwrap().key().unwrap().to_owned()).collect()).unwrap_or_default();
        let header = entry.header();
        assert_eq!(header.mtime().unwrap(), 42);
        let path = entry.path().unwrap().display().to_string();
        shown.push(format!(
            "{} {} {:o} {}",
            path.replace(&"n".repeat(120), "N"),
            header.entry_type().as_byte() as char,
            header.mode().unwrap(),
            pax.join(",")
        ));
    }
    assert_eq!(
        shown,
        ["a 0 4755 gid", "b 1 4755 gid", "c 3 644 ", "l 2 777 ", "long/ 5 755 ", "long/N/ 5 755 path", "long/N/f 0 644 path", "p 6 644 "]
    );
    let mut again = Vec::new();
    merged::write_tar(&base, &mut again, Some(42)).unwrap();
    assert_eq!(bytes, again);
}
