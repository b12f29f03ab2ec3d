//! The plan: a graph of vertices, what the Dockerfile means for one target and one platform.
//! Pure data; made by [`crate::frontend`], run by [`crate::solve`].

use std::net::IpAddr;

use ovenbird_dockerfile::mount::Sharing;
use ovenbird_oci::{Digest, ImageConfig, Platform, Reference};
use serde::Serialize;

/// Index into [`Plan::vertices`].
pub type VertexId = usize;

/// What to do for one platform. Inputs of a vertex always have lower indices than the vertex.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Target platform.
    pub platform: Platform,
    /// All vertices that the target reaches, in topological order; no others.
    pub vertices: Vec<Vertex>,
    /// Root file system of the image; `None`: `FROM scratch` with no files.
    pub root: Option<VertexId>,
    /// Final config: everything but `created`, `rootfs` and `history` (these are made on export).
    pub config: ImageConfig,
    /// History of this build after the base image's own, oldest first. Entries with `layer = true` match, in order, the layers that
    /// the chain of [`Plan::root`] adds above the base image.
    pub history: Vec<HistoryEntry>,
    /// Base image whose history and layers come first.
    pub base: Option<ResolvedImage>,
    /// `SOURCE_DATE_EPOCH` from the build arguments or the Dockerfile's own default, seconds since 1970.
    pub source_date_epoch: Option<i64>,
}

/// One line of history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    /// As BuildKit writes it (`RUN /bin/sh -c make # buildkit`).
    pub created_by: String,
    /// Has a layer.
    pub layer: bool,
}

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub struct Vertex {
    /// What it does.
    pub op: Op,
    /// `[build 2/5] RUN make`.
    pub name: String,
    /// Lines in the Dockerfile, from 1, inclusive.
    pub lines: Option<(u32, u32)>,
    /// Never take the result from the cache.
    pub no_cache: bool,
}

/// What a vertex does. Serialised into the cache key, so it holds no names for people and no secrets, and no vertex ids: these differ
/// from plan to plan; the keys of the inputs take their place.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Op {
    /// Layers of a base image.
    Image(ImageOp),
    /// A folder given with the request: `context`, or the name of a `--build-context`.
    Local {
        /// Which.
        name: String,
    },
    /// A git checkout.
    Git(GitOp),
    /// A download.
    Http(HttpOp),
    /// `RUN`.
    Exec(ExecOp),
    /// `COPY`, `ADD`, `WORKDIR`.
    File(FileOp),
    /// `--link`: the layer of `layer` on top of `base`, without looking at `base`.
    Merge {
        /// Below; `None` is scratch.
        #[serde(skip)]
        base: Option<VertexId>,
        /// A [`Op::File`] on scratch.
        #[serde(skip)]
        layer: VertexId,
    },
}

impl Op {
    /// Vertices this one reads, base first.
    pub fn inputs(&self) -> Vec<VertexId> {
        match self {
            Self::Image(_) | Self::Local { .. } | Self::Git(_) | Self::Http(_) => vec![],
            Self::Exec(exec) => exec.base.into_iter().chain(exec.mounts.iter().filter_map(|m| m.kind.from())).collect(),
            Self::File(file) => file
                .base
                .into_iter()
                .chain(file.actions.iter().filter_map(|a| match a {
                    FileAction::Copy(copy) => Some(copy.from),
                    _ => None,
                }))
                .collect(),
            Self::Merge { base, layer } => base.iter().copied().chain([*layer]).collect(),
        }
    }

    /// The vertex whose layers are below this one's.
    pub fn base(&self) -> Option<VertexId> {
        match self {
            Self::Exec(exec) => exec.base,
            Self::File(file) => file.base,
            Self::Merge { base, .. } => *base,
            _ => None,
        }
    }
}

/// A base image, resolved to one platform's manifest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ImageOp {
    /// Name, for people and for the registry.
    #[serde(skip)]
    pub reference: Reference,
    /// The platform's manifest.
    pub manifest: Digest,
}

/// An image that the frontend asked for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageRequest {
    /// Name as written after expansion (`debian:12`), or `oci-layout://…` from a named context.
    pub name: String,
    /// Which platform.
    pub platform: Platform,
}

/// The answer.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedImage {
    /// Normalised name.
    pub reference: Reference,
    /// The platform's manifest.
    pub manifest: Digest,
    /// Its config.
    pub config: ImageConfig,
}

/// `ADD` of a git repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GitOp {
    /// Without fragment and query, without credentials.
    pub url: String,
    /// Branch, tag or commit; the default branch if absent.
    pub reference: Option<String>,
    /// Folder inside the repository.
    pub subdir: Option<String>,
    /// Keep `.git`.
    pub keep_git_dir: bool,
    /// Commit that must be found, full or prefix.
    pub checksum: Option<String>,
    /// Fetch submodules.
    pub submodules: bool,
}

/// User and password of an address: in no key, and never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// May be a token, with no password behind it.
    pub user: String,
    /// Empty: none.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// `ADD` of a URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HttpOp {
    /// `http://` or `https://`, without credentials.
    pub url: String,
    /// Those that the address had.
    #[serde(skip)]
    pub login: Option<Login>,
    /// Name of the file it becomes (last part of the URL, `__unnamed__` if none, as in BuildKit).
    pub filename: String,
    /// Expected digest.
    pub checksum: Option<Digest>,
}

/// Security mode of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum Security {
    /// Sandboxed.
    #[default]
    Sandbox,
    /// All capabilities of the engine; needs the entitlement `security.insecure`.
    Insecure,
}

/// Network mode of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum NetworkMode {
    /// The build's default.
    #[default]
    Default,
    /// Loopback only.
    None,
    /// The machine's; needs the entitlement `network.host`.
    Host,
}

/// `RUN`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ExecOp {
    /// Root file system; `None`: empty.
    #[serde(skip)]
    pub base: Option<VertexId>,
    /// Program and arguments.
    pub args: Vec<String>,
    /// `NAME=value`, in order: image environment, then build args.
    pub env: Vec<String>,
    /// Names in `env` that were declared with `ARG`, for explanations.
    #[serde(skip)]
    pub arguments: Vec<String>,
    /// Proxy variables: given to the step, never in the key or the history.
    #[serde(skip)]
    pub proxy_env: Vec<String>,
    /// Absolute.
    pub cwd: String,
    /// `USER`, raw; empty is root.
    pub user: String,
    /// Network.
    pub network: NetworkMode,
    /// Security.
    pub security: Security,
    /// Mounts in order.
    pub mounts: Vec<ExecMount>,
    /// Files made from heredocs for this step only: absolute path in the step, content, mode.
    pub inline_files: Vec<(String, String, u32)>,
    /// Host name (`buildkitsandbox` unless set).
    pub hostname: String,
    /// `--add-host`.
    pub hosts: Vec<(String, IpAddr)>,
}

/// One `RUN --mount`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExecMount {
    /// Absolute. For a secret without target and with `env`, empty.
    pub target: String,
    /// What.
    pub kind: ExecMountKind,
}

/// Kinds of mounts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum ExecMountKind {
    /// Files of a vertex.
    Bind {
        /// Whose; `None`: an empty folder.
        #[serde(skip)]
        from: Option<VertexId>,
        /// Path below its root.
        source: String,
        /// Writes are allowed and thrown away.
        writable: bool,
    },
    /// A folder that survives the build.
    Cache {
        /// Name, with namespace.
        id: String,
        /// Initial content.
        #[serde(skip)]
        from: Option<VertexId>,
        /// Path below its root.
        source: String,
        /// Sharing.
        #[serde(serialize_with = "sharing_name")]
        sharing: Sharing,
        /// Read only.
        read_only: bool,
        /// Permission bits of a new folder (0755).
        mode: u32,
        /// Owner of a new folder.
        uid: u32,
        /// Group of a new folder.
        gid: u32,
    },
    /// Memory.
    Tmpfs {
        /// Bytes.
        size: Option<u64>,
    },
    /// A secret.
    Secret {
        /// Id.
        id: String,
        /// Variable that gets the value.
        env: Option<String>,
        /// Must be given.
        required: bool,
        /// Permission bits (0400).
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// An ssh agent.
    Ssh {
        /// Id.
        id: String,
        /// Must be given.
        required: bool,
        /// Permission bits (0600).
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
}

impl ExecMountKind {
    /// The vertex whose files are mounted.
    pub fn from(&self) -> Option<VertexId> {
        match self {
            Self::Bind { from, .. } | Self::Cache { from, .. } => *from,
            _ => None,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn sharing_name<S: serde::Serializer>(sharing: &Sharing, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(match sharing {
        Sharing::Shared => "shared",
        Sharing::Private => "private",
        Sharing::Locked => "locked",
    })
}

/// `COPY`, `ADD`, `WORKDIR`: changes without running anything. One layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FileOp {
    /// Below; `None`: scratch.
    #[serde(skip)]
    pub base: Option<VertexId>,
    /// In order.
    pub actions: Vec<FileAction>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum FileAction {
    /// Copy files of a vertex.
    Copy(CopyAction),
    /// Write one file (heredoc).
    Inline {
        /// Name, used when `dest` ends in `/` or is a folder.
        name: String,
        /// Content.
        content: String,
        /// Absolute; a trailing slash means a folder.
        dest: String,
        /// `--chown`, raw `user[:group]`; absent is 0:0.
        chown: Option<String>,
        /// `--chmod`; absent is 0644.
        chmod: Option<String>,
    },
    /// `WORKDIR`: make the folder and its parents (0755) if missing.
    Mkdir {
        /// Absolute.
        path: String,
        /// `USER` at that point; names are looked up in the base.
        owner: Option<String>,
    },
}

/// Copies sources of one vertex.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CopyAction {
    /// Whose files.
    #[serde(skip)]
    pub from: VertexId,
    /// Expanded, cleaned, relative to the root of `from`; may hold wildcards.
    pub sources: Vec<String>,
    /// Absolute; a trailing slash means a folder.
    pub dest: String,
    /// `--chown`, raw `user[:group]`; absent is 0:0 for a context, the source's own for images and stages.
    pub chown: Option<String>,
    /// `--chmod`, octal or symbolic.
    pub chmod: Option<String>,
    /// `--parents`.
    pub parents: bool,
    /// `--exclude`.
    pub excludes: Vec<String>,
    /// Unpack archives (`ADD` of local files: by content; `--unpack=true`: always tried).
    pub unpack: bool,
    /// `from` keeps its own owners (stage, image); otherwise files become 0:0.
    pub keep_owner: bool,
    /// Permission bits for a downloaded file (0600), when `--chmod` is absent.
    pub default_mode: Option<u32>,
}

impl CopyAction {
    /// A copy with no flags.
    pub fn new(from: VertexId, source: impl Into<String>, dest: impl Into<String>) -> Self {
        Self {
            from,
            sources: vec![source.into()],
            dest: dest.into(),
            chown: None,
            chmod: None,
            parents: false,
            excludes: vec![],
            unpack: false,
            keep_owner: false,
            default_mode: None,
        }
    }
}
