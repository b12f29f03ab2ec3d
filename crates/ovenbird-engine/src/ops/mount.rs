//! `RUN --mount`: what each kind of mount becomes in the sandbox, and the folders of cache mounts.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use ovenbird_dockerfile::mount::Sharing;
use ovenbird_oci::Digest;
use ovenbird_oci::layer::Ownership;
use ovenbird_sandbox::{Level, Mount, MountSource};
use rustix::fs::FlockOperation;

use crate::cache::{Chain, write_chain};
use crate::error::BuildError;
use crate::ops::{Session, exec::StepName, image, merged};
use crate::plan::{ExecMount, ExecMountKind};
use crate::snapshot::Snapshot;
use crate::state::{WorkDir, io_error};

/// Mounts of one step with what must live as long as it runs.
#[derive(Default)]
pub struct Mounts {
    /// For the sandbox.
    pub mounts: Vec<Mount>,
    /// `NAME=value` that mounts add.
    pub env: Vec<String>,
    /// Who is to own what is mounted where the disk does not hold it: path, user, group.
    pub owners: Vec<(PathBuf, u32, u32)>,
    locks: Vec<File>,
    folders: Vec<WorkDir>,
}

/// Prepares the mounts of a step. `chain` gives the result of a vertex, of which at least the given path is needed.
pub fn prepare(
    session: &Session,
    step: &StepName,
    mounts: &[ExecMount],
    chain: &dyn Fn(usize, &str) -> Result<Chain, BuildError>,
) -> Result<Mounts, BuildError> {
    let mut all = Mounts::default();
    let mut agents = 0;
    for mount in mounts {
        match &mount.kind {
            ExecMountKind::Bind { from, source, writable } => {
                let snapshot = match from {
                    Some(vertex) => image::snapshot(session, &chain(*vertex, source)?)?,
                    None => Snapshot::default(),
                };
                let source = all.layers(session, step, &snapshot, source)?;
                all.push(&mount.target, source, !writable);
            }
            ExecMountKind::Cache { id, from, source, sharing, read_only, mode, uid, gid } => {
                let (initial, origin) = match from {
                    Some(vertex) => {
                        let chain = chain(*vertex, source)?;
                        let origin = write_chain(&chain);
                        (Some((image::snapshot(session, &chain)?, source.as_str())), format!("{origin} {source}"))
                    }
                    None => (None, String::new()),
                };
                let name = cache_name(id, *mode, *uid, *gid, &origin);
                let dir = all.cache_folder(session, &name, *sharing, &|dir| {
                    if origin.is_empty() {
                        session.imports.fill(session, &name, dir).map_err(io::Error::other)?;
                    }
                    if let Some((snapshot, source)) = &initial {
                        fill(session, snapshot, source, dir)?;
                    }
                    fs::set_permissions(dir, fs::Permissions::from_mode(*mode))?;
                    if session.state.ownership() == Ownership::Real && (*uid, *gid) != (0, 0) {
                        std::os::unix::fs::chown(dir, Some(*uid), Some(*gid))?;
                    }
                    Ok(())
                })?;
                all.owners.push((PathBuf::from(&mount.target), *uid, *gid));
                all.push(&mount.target, MountSource::Bind(dir), *read_only);
            }
            ExecMountKind::Tmpfs { size } => all.push(&mount.target, MountSource::Tmpfs { size: *size }, false),
            ExecMountKind::Secret { id, env, required, mode, uid, gid } => {
                let content = secret(session, step, id, *required)?;
                if let Some(name) = env {
                    // One that was not given is an empty variable, as in BuildKit.
                    all.env.push(format!("{name}={}", String::from_utf8_lossy(content.as_deref().unwrap_or_default())));
                }
                if let Some(content) = content.filter(|_| !mount.target.is_empty()) {
                    all.push(&mount.target, MountSource::Secret { content, mode: *mode, uid: *uid, gid: *gid }, true);
                }
            }
            ExecMountKind::Ssh { id, required, mode, uid, gid } => {
                let Some(socket) = session.input.ssh.get(id) else {
                    if *required {
                        return Err(step.not_given(
                            format!("ssh agent {id}"),
                            format!("give it with --ssh {id}=SOCKET, or --ssh {id} for $SSH_AUTH_SOCK"),
                        ));
                    }
                    continue;
                };
                let target = if mount.target.is_empty() { format!("/run/buildkit/ssh_agent.{agents}") } else { mount.target.clone() };
                if agents == 0 {
                    all.env.push(format!("SSH_AUTH_SOCK={target}"));
                }
                agents += 1;
                all.push(&target, MountSource::Socket { path: socket.clone(), mode: *mode, uid: *uid, gid: *gid }, false);
            }
        }
    }
    Ok(all)
}

/// Name of the folder of a cache mount. As in BuildKit, one that begins differently (`from`, here `origin`) is another folder.
fn cache_name(id: &str, mode: u32, uid: u32, gid: u32, origin: &str) -> Digest {
    Digest::of(format!("{id}\0{mode:o} {uid} {gid}\0{origin}").as_bytes())
}

/// Names of the folders of a step's cache mounts that mean the same on every machine: those that begin empty.
pub fn shared_caches(mounts: &[ExecMount]) -> impl Iterator<Item = Digest> {
    mounts.iter().filter_map(|mount| match &mount.kind {
        ExecMountKind::Cache { id, from: None, mode, uid, gid, .. } => Some(cache_name(id, *mode, *uid, *gid, "")),
        _ => None,
    })
}

/// The folder of a cache mount that is there, if any, and its lock: no step that wants it alone has it meanwhile.
pub fn existing_cache(session: &Session, name: &Digest) -> Result<Option<(File, PathBuf)>, BuildError> {
    let base = session.state.mount_dir(name);
    let (dir, lock) = (base.join("0"), base.join("0.lock"));
    if !dir.is_dir() {
        return Ok(None);
    }
    let file = File::open(&lock).map_err(io_error("open", &lock))?;
    acquire(session, &file, Sharing::Shared).map_err(|error| match error.kind() {
        io::ErrorKind::Interrupted => BuildError::Cancelled,
        _ => io_error("lock", &lock)(error).into(),
    })?;
    Ok(Some((file, dir)))
}

fn secret(session: &Session, step: &StepName, id: &str, required: bool) -> Result<Option<Vec<u8>>, BuildError> {
    match session.input.secrets.get(id) {
        Some(source) => source.read().map(Some).map_err(|source| BuildError::Secret {
            step: step.name.clone(),
            line: step.line(),
            id: id.to_owned(),
            source,
        }),
        None if required => {
            Err(step.not_given(format!("secret {id}"), format!("give it with --secret id={id},src=FILE or id={id},env=NAME")))
        }
        None => Ok(None),
    }
}

/// Copies the initial content of a cache mount.
fn fill(session: &Session, snapshot: &Snapshot, source: &str, dir: &Path) -> io::Result<()> {
    merged::materialize_subtree(snapshot, Path::new(source.trim_start_matches('/')), dir, session.state.ownership())
        .map_err(io::Error::other)
}

/// Takes the lock of a cache folder; `false`: a private one is in use. Interrupted: the build was stopped while it waited.
fn acquire(session: &Session, lock: &File, sharing: Sharing) -> io::Result<bool> {
    let operation = match sharing {
        Sharing::Shared => FlockOperation::NonBlockingLockShared,
        Sharing::Private | Sharing::Locked => FlockOperation::NonBlockingLockExclusive,
    };
    loop {
        match rustix::fs::flock(lock, operation) {
            Ok(()) => return Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) if sharing == Sharing::Private => return Ok(false),
            // Another step has it; a blocking flock could not be cancelled.
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                if session.stop.load(Ordering::SeqCst) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

impl Mounts {
    fn push(&mut self, target: &str, source: MountSource, read_only: bool) {
        self.mounts.push(Mount { target: PathBuf::from(target), source, read_only });
    }

    /// Files of a snapshot: an overlay where that works, else a copy.
    fn layers(&mut self, session: &Session, step: &StepName, snapshot: &Snapshot, source: &str) -> Result<MountSource, BuildError> {
        let subpath = PathBuf::from(source.trim_start_matches('/'));
        if session.overlay && !snapshot.layers.is_empty() {
            return Ok(MountSource::Layers { lowers: step.lowers(session, snapshot)?, subpath });
        }
        let work = session.state.work_dir()?;
        let dir = work.subdir("mount")?;
        merged::materialize(snapshot, &dir, session.state.ownership()).map_err(|source| BuildError::File {
            step: step.name.clone(),
            line: step.line(),
            source,
        })?;
        self.folders.push(work);
        Ok(MountSource::Layers { lowers: vec![dir], subpath })
    }

    /// The folder of a cache mount, locked as `sharing` says until the step is over.
    fn cache_folder(
        &mut self,
        session: &Session,
        name: &Digest,
        sharing: Sharing,
        initialise: &dyn Fn(&Path) -> io::Result<()>,
    ) -> Result<PathBuf, BuildError> {
        // Without mounts the folder itself is moved into the step's root, so only one step can have it.
        let sharing = if session.level == Some(Level::Chroot) && sharing == Sharing::Shared { Sharing::Locked } else { sharing };
        let base = session.state.mount_dir(name);
        fs::create_dir_all(&base).map_err(io_error("make", &base))?;
        for number in 0_u32.. {
            let lock_path = base.join(format!("{number}.lock"));
            let lock = File::options().create(true).truncate(false).write(true).open(&lock_path).map_err(io_error("open", &lock_path))?;
            if !acquire(session, &lock, sharing).map_err(|error| match error.kind() {
                io::ErrorKind::Interrupted => BuildError::Cancelled,
                _ => io_error("lock", &lock_path)(error).into(),
            })? {
                continue;
            }
            let dir = base.join(number.to_string());
            if !dir.is_dir() {
                // Made aside and renamed, so that a kill leaves no half-filled folder; two shared users may race.
                let work = session.state.work_dir()?;
                let fresh = work.subdir("cache")?;
                initialise(&fresh).map_err(io_error("fill the cache mount", &fresh))?;
                if let Err(error) = fs::rename(&fresh, &dir)
                    && !dir.is_dir()
                {
                    return Err(io_error("make", &dir)(error).into());
                }
            }
            self.locks.push(lock);
            return Ok(dir);
        }
        Err(BuildError::Cancelled)
    }
}
