//! `RUN`: one sandboxed step above a snapshot.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use ovenbird_oci::layer::{Owner, Owners, Ownership};
use ovenbird_sandbox::{Limits, Mount, MountSource, Network, Root, SandboxError, Step, Stream};

use crate::cache::Link;
use crate::error::BuildError;
use crate::event::{Event, LogStream};
use crate::ops::account::{AccountError, Accounts};
use crate::ops::file::FileError;
use crate::ops::log::{LogText, Tail};
use crate::ops::lowers::LowersError;
use crate::ops::{Session, image, merged, mount};
use crate::plan::{ExecOp, NetworkMode, Security};
use crate::snapshot::tree::{Kind, Tree};
use crate::snapshot::{Snapshot, view};
use crate::state::{SnapshotId, remove_tree};

/// Bits of `st_mode`.
const S_IFCHR: u32 = 0o020_000;
const S_IFBLK: u32 = 0o060_000;

/// How a step is called in events and errors.
#[derive(Debug, Clone)]
pub struct StepName {
    /// Number in events.
    pub index: usize,
    /// `[build 2/5] RUN make`.
    pub name: String,
    /// Lines of the instruction.
    pub lines: Option<(u32, u32)>,
}

impl StepName {
    /// First line of the instruction.
    pub fn line(&self) -> Option<u32> {
        self.lines.map(|(first, _)| first)
    }

    /// The error for something the request should have given.
    pub fn not_given(&self, what: String, hint: String) -> BuildError {
        BuildError::NotGiven { step: self.name.clone(), line: self.line(), what, hint }
    }

    /// The error for something that the instruction asks for and nobody can do.
    fn impossible(&self, reason: String, hint: &'static str) -> BuildError {
        BuildError::Instruction { step: self.name.clone(), line: self.line(), reason, hint }
    }

    /// The folders of a snapshot for an overlay mount, highest first.
    pub fn lowers(&self, session: &Session, snapshot: &Snapshot) -> Result<Vec<PathBuf>, BuildError> {
        session.lowers.of(snapshot, ovenbird_sandbox::lowers_max(), session.state).map_err(|error| match error {
            LowersError::File(source) => BuildError::File { step: self.name.clone(), line: self.line(), source },
            LowersError::State(source) => source.into(),
        })
    }

    fn sandbox(&self, session: &Session, source: SandboxError) -> BuildError {
        let source = match source {
            SandboxError::Exec { program, source } => SandboxError::Exec { program: session.masks.text(program), source },
            other => other,
        };
        BuildError::Sandbox { step: self.name.clone(), line: self.line(), source }
    }
}

/// Runs the step; the result is its diff.
pub fn run(
    session: &Session,
    step: &StepName,
    op: &ExecOp,
    base: &[Link],
    chain: &dyn Fn(usize, &str) -> Result<Vec<Link>, BuildError>,
) -> Result<SnapshotId, BuildError> {
    let level = session.level.ok_or_else(|| {
        step.sandbox(
            session,
            SandboxError::Impossible { reason: "no isolation level works; `ovenbird doctor` says what is missing".into() },
        )
    })?;
    refuse_nul(step, op)?;
    let base = image::snapshot(session, base)?;
    let work = session.state.work_dir()?;
    let fs_dir = work.subdir("fs")?;
    let scratch = session.state.work_dir()?;
    let in_place = !session.overlay;
    let tree = view::View::new(&base);
    let owners = lower_owners(&base, &tree, session.state.ownership()).map_err(|error| BuildError::File {
        step: step.name.clone(),
        line: step.line(),
        source: FileError::io("read", "the files of the base")(error),
    })?;
    let (root, before) = if in_place {
        let dir = scratch.subdir("root")?;
        let file_error = |source| BuildError::File { step: step.name.clone(), line: step.line(), source };
        merged::materialize(&base, &dir, session.state.ownership()).map_err(file_error)?;
        let before = merged::Index::of(&dir).map_err(file_error)?;
        (Root::Dir(dir), Some(before.owned(owners.clone())))
    } else {
        let lowers = step.lowers(session, &base)?;
        (Root::Overlay { lowers, upper: fs_dir.clone(), work: scratch.subdir("overlay")? }, None)
    };

    let account = Accounts::read(&tree).lookup(&op.user).map_err(|reason| {
        let hint = match reason {
            AccountError::Unknown { .. } => "add it before this step, for example with RUN adduser or RUN useradd, or give USER a number",
            AccountError::Range { .. } => "give USER another one",
        };
        step.impossible(format!("USER {}: {reason}", op.user), hint)
    })?;
    let mut mounts = mount::prepare(session, step, &op.mounts, chain)?;
    for (path, content, mode) in &op.inline_files {
        mounts.mounts.push(Mount {
            target: PathBuf::from(path),
            source: MountSource::Secret {
                content: content.clone().into_bytes(),
                mode: *mode,
                uid: account.user.uid,
                gid: account.user.gid,
            },
            read_only: true,
        });
    }
    let mut env: Vec<String> = op.env.iter().chain(&op.proxy_env).chain(&mounts.env).cloned().collect();
    if !env.iter().any(|e| e.starts_with("HOME=")) {
        env.push(format!("HOME={}", account.home));
    }
    let limits = &session.input.limits;
    let request = Step {
        root: root.clone(),
        args: op.args.iter().map(OsString::from).collect(),
        env: env.into_iter().map(OsString::from).collect(),
        cwd: PathBuf::from(&op.cwd),
        user: account.user,
        hostname: op.hostname.clone(),
        network: if op.network == NetworkMode::None { Network::None } else { Network::Host },
        mounts: mounts.mounts.clone(),
        hosts: op.hosts.clone(),
        dns: limits.dns.clone(),
        limits: Limits { memory: limits.memory, cpus: limits.cpus, ulimits: limits.ulimits.clone(), shm_size: limits.shm_size },
        insecure: op.security == Security::Insecure,
        stdin: vec![],
        scratch: scratch.subdir("sandbox")?,
        mount_owners: mounts.owners.clone(),
        lower_owners: owners.into_iter().map(|(path, Owner { uid, gid, node })| (PathBuf::from(path), uid, gid, node)).collect(),
    };

    let mut streams = [LogText::new(&session.masks), LogText::new(&session.masks)];
    let mut tail = Tail::default();
    let mut tell = |stream: LogStream, text: String| {
        if !text.is_empty() {
            tail.feed(&text);
            session.sink.emit(Event::Log { vertex: step.index, stream, text });
        }
    };
    let outcome = ovenbird_sandbox::run(
        level,
        &request,
        &mut |stream, bytes| match stream {
            Stream::Stdout => tell(LogStream::Stdout, streams[0].feed(bytes)),
            Stream::Stderr => tell(LogStream::Stderr, streams[1].feed(bytes)),
        },
        &session.stop,
    );
    tell(LogStream::Stdout, streams[0].finish());
    tell(LogStream::Stderr, streams[1].finish());
    let outcome = outcome.map_err(|error| step.sandbox(session, error))?;
    if outcome.cancelled {
        return Err(BuildError::Cancelled);
    }
    if outcome.code != 0 {
        return Err(BuildError::Step {
            name: step.name.clone(),
            lines: step.lines,
            command: session.masks.text(op.args.join(" ")),
            code: outcome.code,
            out_of_memory: outcome.out_of_memory,
            tail: tail.into_lines(),
        });
    }
    let mut owners: Owners =
        outcome.owners.into_iter().map(|(path, uid, gid, node)| (path.into_os_string(), Owner { uid, gid, node })).collect();
    if let (Root::Dir(dir), Some(before)) = (&root, &before) {
        owners = merged::diff(before, dir, &fs_dir, owners, session.state.ownership()).map_err(|source| BuildError::File {
            step: step.name.clone(),
            line: step.line(),
            source,
        })?;
        let _ = remove_tree(dir);
    }
    Ok(session.state.commit(work, None, &owners)?)
}

/// A NUL byte ends every string that a program is started with.
fn refuse_nul(step: &StepName, op: &ExecOp) -> Result<(), BuildError> {
    let targets = op.mounts.iter().map(|mount| &mount.target).chain(op.inline_files.iter().map(|file| &file.0));
    let what = [
        ("the command", op.args.iter().any(|arg| arg.contains('\0'))),
        ("the environment", op.env.iter().chain(&op.proxy_env).any(|entry| entry.contains('\0'))),
        ("the working directory", op.cwd.contains('\0')),
        ("the target of a mount", { targets }.any(|target| target.contains('\0'))),
    ];
    match what.iter().find(|(_, found)| *found) {
        Some((what, _)) => Err(step.impossible(format!("{what} has a NUL byte, which no program can be given"), "remove the byte")),
        None => Ok(()),
    }
}

/// Intended owners of the merged tree where the disk does not hold them.
fn lower_owners(base: &Snapshot, tree: &dyn Tree, ownership: Ownership) -> std::io::Result<Owners> {
    let mut owners = Owners::new();
    for path in base.layers.iter().flat_map(|layer| layer.owners.keys()) {
        // A higher layer may have something else there.
        let Some(entry) = tree.entry(Path::new(path))? else { continue };
        let node = match entry.kind {
            Kind::Char(major, minor) => Some((S_IFCHR | entry.mode, major, minor)),
            Kind::Block(major, minor) => Some((S_IFBLK | entry.mode, major, minor)),
            Kind::File | Kind::Dir => ownership.permissions(entry.is_dir(), entry.mode).1,
            _ => None,
        };
        if (entry.uid, entry.gid, node) != (0, 0, None) {
            owners.insert(path.clone(), Owner { uid: entry.uid, gid: entry.gid, node });
        }
    }
    Ok(owners)
}
