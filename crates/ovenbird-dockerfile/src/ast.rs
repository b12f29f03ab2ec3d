//! The typed tree of a Dockerfile. Words are raw: nothing here is expanded yet.

use crate::diagnostic::Span;

/// A whole file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dockerfile {
    /// `# syntax=`, `# escape=`, `# check=` at the top.
    pub directives: Directives,
    /// `ARG`s before the first `FROM`.
    pub global_args: Vec<Instruction>,
    /// Stages in the order of the file.
    pub stages: Vec<Stage>,
}

/// Parser directives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directives {
    /// `# syntax=` value.
    pub syntax: Option<String>,
    /// Escape character: `\` or a backtick.
    pub escape: char,
    /// `# check=` value, raw (`skip=A,B;error=true`).
    pub check: Option<String>,
}

impl Default for Directives {
    fn default() -> Self {
        Self { syntax: None, escape: '\\', check: None }
    }
}

/// One `FROM` and what follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Base, raw (`debian:${V}`).
    pub base: String,
    /// `--platform=`, raw.
    pub platform: Option<String>,
    /// `AS name`, lower-cased.
    pub name: Option<String>,
    /// `AS name` as written.
    pub name_as_written: Option<String>,
    /// Comment block right above the `FROM` (its description), if any.
    pub doc: Option<String>,
    /// Instructions after the `FROM`.
    pub instructions: Vec<Instruction>,
    /// The `FROM` line.
    pub span: Span,
    /// The `FROM` line as written, continuation folded.
    pub original: String,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    /// What it is.
    pub kind: Kind,
    /// Whole instruction in the file, heredoc bodies included.
    pub span: Span,
    /// As written, continuations folded into one line, without heredoc bodies.
    pub original: String,
}

/// `name` or `name=default` of an `ARG`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArgDecl {
    /// Variable name.
    pub name: String,
    /// Default, raw word (quotes kept).
    pub default: Option<String>,
}

/// `key=value` of `ENV` or `LABEL`, both raw words (quotes kept).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// Key.
    pub key: String,
    /// Value.
    pub value: String,
    /// Written in the legacy form `ENV key value` (whole rest of the line).
    pub legacy: bool,
}

/// Shell or exec (JSON) form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Text for the shell.
    Shell(String),
    /// JSON array.
    Exec(Vec<String>),
}

/// A here-document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    /// Delimiter, without quotes.
    pub name: String,
    /// Body, with `<<-` tabs already stripped.
    pub content: String,
    /// Variables are expanded (the delimiter was not quoted).
    pub expand: bool,
    /// Written `<<-`.
    pub strip_tabs: bool,
    /// File descriptor before `<<` (0 if none).
    pub fd: u32,
}

/// `--name=value` (value empty for a bare `--link`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flag {
    /// Without the dashes.
    pub name: String,
    /// Raw, unexpanded; `None` for the bare form.
    pub value: Option<String>,
    /// Where.
    pub span: Span,
}

/// `RUN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// For a pure heredoc (`RUN <<EOF`) this is `Shell("<<EOF")`; the frontend decides how to run it.
    pub command: Command,
    /// Here-documents, in order.
    pub heredocs: Vec<Heredoc>,
    /// `--mount=` values, raw, in order. See [`crate::mount`].
    pub mounts: Vec<Flag>,
    /// `--network=`.
    pub network: Option<String>,
    /// `--security=`.
    pub security: Option<String>,
    /// `--device=` values.
    pub devices: Vec<String>,
}

/// A source of `COPY`/`ADD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Raw word.
    Path(String),
    /// Inline file; its name is the delimiter.
    Heredoc(Heredoc),
}

/// `COPY` and `ADD`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// Sources in order.
    pub sources: Vec<Source>,
    /// Destination, raw word.
    pub dest: String,
    /// `--from=` (COPY only), raw.
    pub from: Option<String>,
    /// `--chown=`, raw.
    pub chown: Option<String>,
    /// `--chmod=`, raw.
    pub chmod: Option<String>,
    /// `--link`.
    pub link: bool,
    /// `--parents`.
    pub parents: bool,
    /// `--exclude=`, raw, in order.
    pub excludes: Vec<String>,
    /// `--checksum=` (ADD only), raw.
    pub checksum: Option<String>,
    /// `--keep-git-dir` (ADD only).
    pub keep_git_dir: Option<bool>,
    /// `--unpack` (ADD only).
    pub unpack: Option<bool>,
}

/// `HEALTHCHECK`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Healthcheck {
    /// `HEALTHCHECK NONE`.
    None,
    /// `HEALTHCHECK [options] CMD …`.
    Cmd {
        /// The check.
        command: Command,
        /// Durations are raw Go durations (`5m`, `1.5s`), validated by the parser when they hold no `$`.
        interval: Option<String>,
        /// `--timeout`.
        timeout: Option<String>,
        /// `--start-period`.
        start_period: Option<String>,
        /// `--start-interval`.
        start_interval: Option<String>,
        /// `--retries`.
        retries: Option<String>,
    },
}

/// The instruction's own part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// `ARG a b=c`.
    Arg(Vec<ArgDecl>),
    /// `ENV`.
    Env(Vec<KeyValue>),
    /// `LABEL`.
    Label(Vec<KeyValue>),
    /// `COPY`.
    Copy(Transfer),
    /// `ADD`.
    Add(Transfer),
    /// `RUN`.
    Run(Run),
    /// `CMD`.
    Cmd(Command),
    /// `ENTRYPOINT`.
    Entrypoint(Command),
    /// `SHELL`.
    Shell(Vec<String>),
    /// `USER`.
    User(String),
    /// `WORKDIR`.
    Workdir(String),
    /// `VOLUME`.
    Volume(Vec<String>),
    /// `EXPOSE`.
    Expose(Vec<String>),
    /// `STOPSIGNAL`.
    StopSignal(String),
    /// `MAINTAINER`.
    Maintainer(String),
    /// `HEALTHCHECK`.
    Healthcheck(Healthcheck),
    /// `ONBUILD`: text of the trigger, stored in the image, parsed again when it fires.
    Onbuild(String),
}
