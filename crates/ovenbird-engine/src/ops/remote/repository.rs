//! One git repository: the commit that a name stands for, and the files of a commit. `ADD` of a repository and contexts from one both use it.
//!
//! It runs the git command in an environment of its own. What decides the files (filters, line ends, attributes, hooks) is never the user's or the
//! machine's; how to reach the repository (credential helpers, proxies, `insteadOf`, ssh) is the user's where [`Access::user`] says so. All
//! configuration is in a file that is only in memory: credentials are on no command line, in no environment and on no disk, and submodules are
//! fetched with the same.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::plan::GitOp;
use crate::state::remove_tree;

/// Most bytes that are read of an answer: the refs of the largest repositories are some tens of megabytes.
const MAX_ANSWER: u64 = 256 << 20;
/// Most bytes that are kept of complaints.
const MAX_COMPLAINT: u64 = 1 << 20;
/// How often a running command is looked at.
const TICK: Duration = Duration::from_millis(5);
/// What a file that stands for one of Git LFS begins with.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\n";
/// Lines of complaints that say nothing of the cause.
const EMPTY_WORDS: [&str; 9] = [
    "Could not read from remote repository",
    "Please make sure you have",
    "and the repository exists",
    "hint: ",
    "Warning: Permanently added",
    // Git LFS, of files that are gone by the time somebody looks.
    "Downloading ",
    "Errors logged to ",
    "Use `git lfs logs",
    "Error reading `git config`",
];
/// Where programs are when nobody says.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Variables of git that say how to reach a server, and no more.
const GIT_VARIABLES: [&str; 4] = ["GIT_SSH", "GIT_SSH_COMMAND", "GIT_SSH_VARIANT", "GIT_PROXY_COMMAND"];
/// Sections of the user's configuration that say how to reach a server, and no more.
const REACH: [&str; 4] = ["credential.", "http.", "url.", "ssh."];
/// Single keys of that sort.
const REACH_KEYS: [&str; 4] = ["core.sshcommand", "core.gitproxy", "safe.directory", "protocol.version"];

/// `git` in a folder, as little as possible under the influence of who runs it, and of what the repository says.
pub fn hardened(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(dir)
        .args(["-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false"])
        .stdin(Stdio::null())
        .env_clear()
        .env("PATH", SEARCH_PATH)
        .env("HOME", "/nonexistent")
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0");
    command
}

/// Objects with one beginning that are looked at.
const MOST_CANDIDATES: usize = 16;

/// How a repository is reached.
#[derive(Clone, Default)]
pub struct Access {
    /// `Authorization` for the server of the URL: `basic …`, `bearer …`.
    pub authorization: Option<String>,
    /// Socket of an ssh agent.
    pub agent: Option<PathBuf>,
    /// Variables of the user who typed the URL: their configuration of git and ssh counts, and the URL may be that of a folder. `None`: the URL
    /// came with a Dockerfile, and nothing of the user plays a part.
    pub user: Option<Vec<(String, String)>>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("authorized", &self.authorization.is_some()).field("agent", &self.agent).finish_non_exhaustive()
    }
}

impl Access {
    /// What `GIT_AUTH_HEADER` and `GIT_AUTH_TOKEN` say, each also with `.HOST`, as in BuildKit. `secret` reads one by name.
    #[must_use]
    pub fn with_secrets(mut self, url: &str, secret: impl Fn(&str) -> Option<String>) -> Self {
        let host = super::host_of(url);
        let of = |name: &str| secret(&format!("{name}.{host}")).or_else(|| secret(name));
        let token = || Some(basic("x-access-token", &of("GIT_AUTH_TOKEN")?));
        self.authorization = of("GIT_AUTH_HEADER").or_else(token).or(self.authorization);
        self
    }

    /// Replaces what nobody may see.
    fn masked(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in self.authorization.iter().flat_map(|header| spellings(header)).filter(|secret| secret.len() > 2) {
            text = text.replace(&secret, "***");
        }
        text
    }
}

/// `basic …` of a user and a password.
pub fn basic(user: &str, password: &str) -> String {
    use base64::Engine as _;
    format!("basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

/// A header, the credential in it, and the password in that.
fn spellings(header: &str) -> Vec<String> {
    use base64::Engine as _;
    let mut found = vec![header.to_owned()];
    let Some((scheme, credential)) = header.split_once(' ') else { return found };
    found.push(credential.trim().to_owned());
    if scheme.eq_ignore_ascii_case("basic")
        && let Ok(plain) = base64::engine::general_purpose::STANDARD.decode(credential.trim())
        && let Ok(plain) = String::from_utf8(plain)
        && let Some((user, password)) = plain.split_once(':')
    {
        // A token may stand where the name of a user does.
        found.push(if password.is_empty() { user.to_owned() } else { password.to_owned() });
    }
    found
}

/// Why a repository, or a commit of it, cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// A word that git would take for an option.
    #[error("{word:?} is not a valid git URL, ref or folder")]
    Word {
        /// As given.
        word: String,
    },
    /// Git is not there.
    #[error("the git command is not installed")]
    NoProgram,
    /// Git cannot be started.
    #[error("git could not be started: {source}")]
    Start {
        /// Why.
        source: std::io::Error,
    },
    /// Git does not take its configuration from us.
    #[error("git does not read the configuration that it is given: git 2.32 or newer is needed, and /proc")]
    Unguarded,
    /// Git failed.
    #[error("git {command} failed: {said}")]
    Failed {
        /// `fetch`…
        command: String,
        /// What it said, on one line.
        said: String,
    },
    /// The configuration of Git LFS that came with the repository is none.
    #[error("the .lfsconfig of the repository cannot be read: {said}; correct it there")]
    LfsConfig {
        /// What git said, on one line.
        said: String,
    },
    /// Git LFS failed.
    #[error("Git LFS cannot get the large files of the repository: {said}")]
    Lfs {
        /// What it said, on one line.
        said: String,
    },
    /// Nothing in it.
    #[error("the repository is empty")]
    Empty,
    /// No such branch, tag or commit.
    #[error("the repository does not contain ref {wanted}: no branch, tag or commit has that name")]
    NoRef {
        /// As asked for.
        wanted: String,
    },
    /// The beginning of several commits.
    #[error("{wanted} is the beginning of several commits of the repository ({}); give more digits", commits.join(", "))]
    Ambiguous {
        /// As asked for.
        wanted: String,
        /// The first of them.
        commits: Vec<String>,
    },
    /// Another commit than the one that must be found.
    #[error("it is at commit {commit}, not at --checksum={checksum}")]
    Checksum {
        /// What was found.
        commit: String,
        /// What was asked for.
        checksum: String,
    },
    /// No such folder in it.
    #[error("{subdir:?} is not a folder of the repository")]
    NoFolder {
        /// As asked for.
        subdir: String,
    },
    /// A file operation failed.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The build was stopped.
    #[error("stopped")]
    Stopped,
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> GitError + '_ {
    move |source| GitError::File { path: path.to_owned(), source }
}

/// What a name in a repository stands for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resolved {
    /// The full commit; `None`: a short one, which is looked for in the history.
    pub commit: Option<String>,
    /// The branch it was found by.
    pub branch: Option<String>,
    /// Tags of the commit.
    pub tags: Vec<String>,
}

/// The files of a commit.
#[derive(Debug)]
pub struct Checkout {
    /// Full commit.
    pub commit: String,
    /// When it was made, seconds since 1970.
    pub time: i64,
    /// The folder that was asked for: of the repository, or the whole.
    pub folder: PathBuf,
    /// Files that stand for others in Git LFS, which is not installed: the first, and how many.
    pub pointers: Option<(String, usize)>,
}

/// Who watches: gets what git says, and may stop it.
pub struct Watch<'a> {
    /// A piece of text.
    pub say: &'a dyn Fn(&str),
    /// Shall everything stop?
    pub stopped: &'a dyn Fn() -> bool,
}

impl std::fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

/// A repository that can be asked.
#[derive(Debug)]
pub struct Repository<'a> {
    op: &'a GitOp,
    access: &'a Access,
    watch: Watch<'a>,
    /// The whole configuration of git.
    config: File,
    /// The ssh command; `None`: the user has one.
    ssh: Option<String>,
    lfs: bool,
}

impl<'a> Repository<'a> {
    /// Reads the configuration, and sees that git does. Asks no server.
    pub fn open(op: &'a GitOp, access: &'a Access, watch: Watch<'a>) -> Result<Self, GitError> {
        for word in [Some(&op.url), op.reference.as_ref(), op.subdir.as_ref(), op.checksum.as_ref()].into_iter().flatten() {
            if word.starts_with('-') || word.contains(['\n', '\r', '\0']) {
                return Err(GitError::Word { word: word.clone() });
            }
        }
        let reach = match &access.user {
            Some(variables) => reach_of(variables)?,
            None => vec![],
        };
        let lfs = access.user.as_deref().is_some_and(|variables| on_path("git-lfs", variables));
        let own_ssh = reach.iter().any(|(key, _)| key == "core.sshcommand")
            || access.user.iter().flatten().any(|(name, _)| matches!(name.as_str(), "GIT_SSH" | "GIT_SSH_COMMAND"));
        let ssh = (!own_ssh).then(|| ssh_command(access));
        let config = in_memory(&configuration(op, access, &reach, lfs)).map_err(|source| GitError::Start { source })?;
        let this = Self { op, access, watch, config, ssh, lfs };
        // An old git, or one that cannot read the file, goes on without: neither what protects us nor the credentials would count.
        match this.run(Path::new("/"), &["config", "--get", "core.hooksPath"]) {
            Ok(value) if value.trim() == "/dev/null" => Ok(this),
            Ok(_) | Err(GitError::Failed { .. }) => Err(GitError::Unguarded),
            Err(error) => Err(error),
        }
    }

    /// Asks the server what the wanted name stands for.
    pub fn resolve(&self) -> Result<Resolved, GitError> {
        let wanted = self.op.reference.as_deref();
        if let Some(commit) = wanted.filter(|r| is_commit(r)) {
            return self.checked(Resolved { commit: Some(commit.to_ascii_lowercase()), ..Resolved::default() });
        }
        let listing = self.run(Path::new("/"), &["ls-remote", "--symref", "--", &self.op.url])?;
        let refs: Vec<(&str, &str)> = listing.lines().filter_map(|line| line.split_once('\t')).collect();
        let find = |name: &str| refs.iter().find(|(commit, n)| *n == name && is_commit(commit));
        let names = match wanted {
            None => vec!["HEAD".to_owned()],
            Some(wanted) => vec![
                format!("refs/tags/{wanted}^{{}}"),
                format!("refs/tags/{wanted}"),
                format!("refs/heads/{wanted}"),
                format!("{wanted}^{{}}"),
                wanted.to_owned(),
                // `pull/7/head`
                format!("refs/{wanted}"),
            ],
        };
        let Some((commit, name)) = names.iter().find_map(|name| find(name)) else {
            return match wanted {
                None => Err(GitError::Empty),
                Some(wanted) if is_hex(wanted) && wanted.len() >= 4 => Ok(Resolved::default()),
                Some(wanted) => Err(GitError::NoRef { wanted: wanted.to_owned() }),
            };
        };
        let head =
            || refs.iter().find(|(target, n)| *n == "HEAD" && target.starts_with("ref: ")).map(|(target, _)| &target["ref: ".len()..]);
        let full = if *name == "HEAD" { head().unwrap_or_default() } else { name };
        let tags = refs.iter().filter(|(of, _)| of == commit).filter_map(|(_, name)| name.strip_prefix("refs/tags/"));
        let mut tags: Vec<String> = tags.map(|tag| tag.trim_end_matches("^{}").to_owned()).collect();
        tags.sort_unstable();
        tags.dedup();
        self.checked(Resolved { commit: Some((*commit).to_owned()), branch: full.strip_prefix("refs/heads/").map(str::to_owned), tags })
    }

    fn checked(&self, resolved: Resolved) -> Result<Resolved, GitError> {
        if let Some(commit) = &resolved.commit {
            self.check(commit)?;
        }
        Ok(resolved)
    }

    fn check(&self, commit: &str) -> Result<(), GitError> {
        match &self.op.checksum {
            Some(checksum) if !commit.starts_with(&checksum.to_ascii_lowercase()) => {
                Err(GitError::Checksum { commit: commit.to_owned(), checksum: checksum.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Fetches a commit into an empty folder, without its history where the server allows it. Everybody may read the files: folders are 0755, files
    /// 0755 or 0644, whatever the umask.
    pub fn check_out(&self, resolved: &Resolved, dir: &Path) -> Result<Checkout, GitError> {
        let commit = self.fetch(resolved, dir)?;
        self.check(&commit)?;
        if let Err(error) = self.run(dir, &["checkout", "--quiet", "--detach", &commit]) {
            return Err(self.of_lfs(error, &commit, dir)?);
        }
        if self.op.submodules && dir.join(".gitmodules").symlink_metadata().is_ok_and(|meta| meta.is_file()) {
            let update = ["submodule", "--quiet", "update", "--init", "--recursive"];
            // A server may refuse a commit that no branch ends in.
            if let Err(error) = self.run(dir, &[&update[..], &["--depth=1"]].concat()) {
                self.go_on(error)?;
                self.run(dir, &update)?;
            }
        }
        let time = self.run(dir, &["show", "--no-patch", "--format=%ct", &commit])?;
        let pointers = self.pointers(dir)?;
        if !self.op.keep_git_dir {
            remove_tree(&dir.join(".git")).map_err(at(dir))?;
        }
        let folder = match self.op.subdir.as_deref().map(|subdir| subdir.trim_matches('/')).filter(|subdir| !matches!(*subdir, "" | ".")) {
            None => dir.to_owned(),
            Some(subdir) => {
                // A symlink in the repository must not lead out of it.
                let inside = dir.join(subdir).canonicalize().ok();
                let root = dir.canonicalize().map_err(at(dir))?;
                inside
                    .filter(|real| real.starts_with(&root) && real.is_dir())
                    .ok_or_else(|| GitError::NoFolder { subdir: subdir.to_owned() })?
            }
        };
        normalise(&folder, self.op.keep_git_dir).map_err(at(&folder))?;
        Ok(Checkout { commit, time: time.trim().parse().unwrap_or(0), folder, pointers })
    }

    /// Why files cannot be had, when it was Git LFS: a configuration that it cannot read it leaves out, and fails at something else.
    fn of_lfs(&self, error: GitError, commit: &str, dir: &Path) -> Result<GitError, GitError> {
        let GitError::Failed { said, .. } = self.go_on(error)? else { return Ok(GitError::Stopped) };
        if !self.lfs || !said.to_ascii_lowercase().contains("lfs") && !said.contains("Smudge error") {
            return Ok(GitError::Failed { command: "checkout".into(), said });
        }
        let blob = format!("{commit}:.lfsconfig");
        if self.run(dir, &["cat-file", "-e", &blob]).is_ok()
            && let Err(GitError::Failed { said, .. }) = self.run(dir, &["config", "--blob", &blob, "--list"])
        {
            return Ok(GitError::LfsConfig { said: said.replace(&blob, ".lfsconfig") });
        }
        Ok(GitError::Lfs { said })
    }

    fn fetch(&self, resolved: &Resolved, dir: &Path) -> Result<String, GitError> {
        let commit = resolved.commit.as_deref();
        let format = if commit.is_some_and(|commit| commit.len() == 64) { "sha256" } else { "sha1" };
        self.run(dir, &["init", "--quiet", "--template=", "--initial-branch=main", &format!("--object-format={format}")])?;
        self.run(dir, &["remote", "add", "origin", "--", &self.op.url])?;
        let wanted = commit.or(self.op.reference.as_deref()).unwrap_or("HEAD").to_owned();
        let mut why = None;
        let shallow = match commit {
            Some(_) => match self.run(dir, &["fetch", "--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", "origin", &wanted]) {
                Ok(_) => true,
                Err(error) => {
                    why = Some(self.go_on(error)?);
                    false
                }
            },
            None => false,
        };
        if !shallow {
            // The server refuses commits that no ref points at, or the commit is short: fetch the history.
            self.run(dir, &["fetch", "--quiet", "--tags", "--no-recurse-submodules", "origin", "+refs/heads/*:refs/remotes/origin/*"])?;
        }
        let full = self.run(dir, &["rev-parse", "--verify", "--quiet", "--end-of-options", &format!("{wanted}^{{commit}}")]);
        match full {
            Ok(full) => Ok(full.trim().to_owned()),
            Err(GitError::Stopped) => Err(GitError::Stopped),
            Err(_) => match why {
                Some(why) => Err(why),
                None => Err(self.none_or_many(wanted, dir)?),
            },
        }
    }

    /// Why a short commit is none.
    fn none_or_many(&self, wanted: String, dir: &Path) -> Result<GitError, GitError> {
        let objects = self.run(dir, &["rev-parse", &format!("--disambiguate={wanted}")])?;
        let mut commits = vec![];
        for object in objects.lines().take(MOST_CANDIDATES) {
            if self.run(dir, &["cat-file", "-t", object])?.trim() == "commit" {
                commits.push(object.to_owned());
            }
        }
        Ok(if commits.len() > 1 { GitError::Ambiguous { wanted, commits } } else { GitError::NoRef { wanted } })
    }

    /// Is there another way after this? Not when the build was stopped.
    fn go_on(&self, error: GitError) -> Result<GitError, GitError> {
        if matches!(error, GitError::Failed { .. }) && !(self.watch.stopped)() { Ok(error) } else { Err(error) }
    }

    /// Files that should have come from Git LFS.
    fn pointers(&self, dir: &Path) -> Result<Option<(String, usize)>, GitError> {
        if self.lfs {
            return Ok(None);
        }
        let listing = self.run(dir, &["ls-files", "-z", "--", ":(attr:filter=lfs)"])?;
        let is_pointer = |name: &&str| {
            let mut head = vec![];
            let path = dir.join(name);
            path.symlink_metadata().is_ok_and(|meta| meta.is_file())
                && File::open(path).is_ok_and(|file| file.take(LFS_POINTER.len() as u64).read_to_end(&mut head).is_ok())
                && head == LFS_POINTER
        };
        let mut found = listing.split('\0').filter(|name| !name.is_empty()).filter(is_pointer);
        Ok(found.next().map(|first| (first.to_owned(), 1 + found.count())))
    }

    fn run(&self, dir: &Path, args: &[&str]) -> Result<String, GitError> {
        let mut command = Command::new("git");
        command.current_dir(dir).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        command.env_clear().env("PATH", SEARCH_PATH).env("HOME", "/nonexistent");
        for (name, value) in self.access.user.iter().flatten() {
            // The repository must not be looked for elsewhere, and nobody is there to be asked for a password.
            let git = name.starts_with("GIT_") && !GIT_VARIABLES.contains(&name.as_str()) && !name.starts_with("GIT_SSL_");
            if !git && !name.starts_with("SSH_ASKPASS") && !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0') {
                command.env(name, value);
            }
        }
        // Local repositories are for who typed the URL, and never submodules of others.
        let local = self.access.user.is_some() && is_local(&self.op.url) && args.first() != Some(&"submodule");
        command
            .env("LC_ALL", "C")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", format!("/proc/{}/fd/{}", std::process::id(), self.config.as_raw_fd()))
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_NO_REPLACE_OBJECTS", "1")
            .env("GIT_ALLOW_PROTOCOL", if local { "https:http:ssh:git:file" } else { "https:http:ssh:git" });
        if let Some(ssh) = &self.ssh {
            command.env("GIT_SSH_COMMAND", ssh);
        }
        if let Some(agent) = &self.access.agent {
            command.env("SSH_AUTH_SOCK", agent);
        }
        let (status, stdout, errors) = self.finish(&mut command)?;
        let errors = self.access.masked(&errors);
        if !errors.trim().is_empty() {
            (self.watch.say)(&errors);
        }
        if status.success() {
            return Ok(stdout);
        }
        let name = args.iter().find(|word| !word.starts_with('-')).unwrap_or(&"");
        Err(GitError::Failed { command: (*name).to_owned(), said: essence(&errors) })
    }

    /// Runs a command to its end, or stops it with everything that it started.
    fn finish(&self, command: &mut Command) -> Result<(ExitStatus, String, String), GitError> {
        if (self.watch.stopped)() {
            return Err(GitError::Stopped);
        }
        let mut child = command.spawn().map_err(not_started)?;
        let read = |pipe: Option<Box<dyn Read + Send>>, most: u64| {
            std::thread::spawn(move || {
                let mut bytes = vec![];
                if let Some(mut pipe) = pipe {
                    let _ = (&mut pipe).take(most).read_to_end(&mut bytes);
                    let _ = std::io::copy(&mut pipe, &mut std::io::sink());
                }
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        let out = read(child.stdout.take().map(|pipe| Box::new(pipe) as _), MAX_ANSWER);
        let err = read(child.stderr.take().map(|pipe| Box::new(pipe) as _), MAX_COMPLAINT);
        let status = loop {
            match child.try_wait().map_err(|source| GitError::Start { source })? {
                Some(status) => break status,
                None if (self.watch.stopped)() => {
                    stop(&mut child);
                    return Err(GitError::Stopped);
                }
                None => std::thread::sleep(TICK),
            }
        };
        Ok((status, out.join().unwrap_or_default(), err.join().unwrap_or_default()))
    }
}

/// The first lines of a complaint that say something.
fn essence(errors: &str) -> String {
    let lines = || errors.lines().map(|line| line.trim().trim_start_matches("fatal: ")).filter(|line| !line.is_empty());
    let advice = |line: &&str| EMPTY_WORDS.iter().any(|words| line.starts_with(words));
    let mut told: Vec<&str> = lines().filter(|line| !advice(line)).take(3).collect();
    if told.is_empty() {
        told = lines().take(1).collect();
    }
    if told.is_empty() { "no reason given".into() } else { told.join("; ").chars().filter(|c| !c.is_control()).take(600).collect() }
}

fn not_started(source: std::io::Error) -> GitError {
    if source.kind() == std::io::ErrorKind::NotFound { GitError::NoProgram } else { GitError::Start { source } }
}

fn stop(child: &mut Child) {
    if let Some(group) = Pid::from_raw(child.id().cast_signed()) {
        let _ = kill_process_group(group, Signal::TERM);
        std::thread::sleep(TICK * 10);
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

/// How the user's own configuration says that servers are reached: keys in lower case but for the middle, in order.
fn reach_of(variables: &[(String, String)]) -> Result<Vec<(String, String)>, GitError> {
    let listed = Command::new("git")
        .args(["config", "--list", "-z"])
        .current_dir("/")
        .stdin(Stdio::null())
        .env_clear()
        .envs(variables.iter().filter(|(name, value)| !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')).cloned())
        .env("GIT_DIR", "/nonexistent")
        .env("LC_ALL", "C")
        .output()
        .map_err(not_started)?;
    if !listed.status.success() {
        let said = String::from_utf8_lossy(&listed.stderr).trim().to_owned();
        return Err(GitError::Failed { command: "config".into(), said });
    }
    let text = String::from_utf8_lossy(&listed.stdout);
    let entries = text.split('\0').filter_map(|entry| entry.split_once('\n'));
    let wanted = |key: &str| REACH.iter().any(|section| key.starts_with(section)) || REACH_KEYS.contains(&key);
    Ok(entries.filter(|(key, _)| wanted(key)).map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

fn on_path(program: &str, variables: &[(String, String)]) -> bool {
    let path = variables.iter().find(|(name, _)| name == "PATH").map_or(SEARCH_PATH, |(_, path)| path);
    path.split(':').filter(|dir| dir.starts_with('/')).any(|dir| Path::new(dir).join(program).is_file())
}

/// The text of the configuration file.
fn configuration(op: &GitOp, access: &Access, reach: &[(String, String)], lfs: bool) -> String {
    let mut text = String::new();
    let mut set = |key: &str, value: &str| {
        let Some((section, rest)) = key.split_once('.') else { return };
        let (middle, name) = rest.rsplit_once('.').map_or((None, rest), |(middle, name)| (Some(middle), name));
        let head = middle.map_or_else(|| section.to_owned(), |middle| format!("{section} {}", quoted(middle)));
        let _ = writeln!(text, "[{head}]\n\t{name} = {}", quoted(value));
    };
    for (key, value) in reach {
        set(key, value);
    }
    for (key, value) in [
        ("core.hooksPath", "/dev/null"),
        ("core.fsmonitor", "false"),
        ("core.autocrlf", "false"),
        ("core.attributesFile", "/dev/null"),
        ("core.excludesFile", "/dev/null"),
        ("protocol.ext.allow", "never"),
        ("transfer.fsckObjects", "true"),
        ("advice.detachedHead", "false"),
        ("gc.auto", "0"),
        ("maintenance.auto", "false"),
    ] {
        set(key, value);
    }
    if lfs {
        set("filter.lfs.clean", "git-lfs clean -- %f");
        set("filter.lfs.smudge", "git-lfs smudge -- %f");
        set("filter.lfs.process", "git-lfs filter-process");
        set("filter.lfs.required", "true");
    }
    if let (Some(header), Some(origin)) = (&access.authorization, origin_of(&op.url)) {
        // Bound to the origin, so that a redirect or a submodule elsewhere does not get it.
        set(&format!("http.{origin}/.extraHeader"), &format!("Authorization: {}", header.replace(['\r', '\n'], "")));
    }
    text
}

fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n").replace('\t', "\\t");
    format!("\"{escaped}\"")
}

/// A file that no folder has. Closed when git starts; git opens it by the number of this process.
fn in_memory(text: &str) -> std::io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("git-config", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    Ok(file)
}

/// Ssh that asks nobody.
fn ssh_command(access: &Access) -> String {
    let Some(variables) = &access.user else {
        // Neither the keys nor the hosts of the user: the agent alone.
        return "ssh -F /dev/null -o BatchMode=yes -o IdentityFile=none -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=/dev/null -o \
                LogLevel=ERROR"
            .into();
    };
    let mut command = "ssh -o BatchMode=yes".to_owned();
    let home = variables.iter().find(|(name, _)| name == "HOME").map(|(_, home)| Path::new(home)).filter(|home| home.is_absolute());
    // Ssh takes the home from the table of users, where another one stands inside a user namespace.
    if let Some(home) = home.filter(|home| Some(*home) != home_of_user().as_deref()) {
        let word = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
        let ssh = home.join(".ssh");
        let config = ssh.join("config");
        let _ = write!(command, " -F {}", if config.is_file() { word(&config) } else { "/dev/null".into() });
        // What is said on the command line comes before the user's file.
        if !fs::read_to_string(&config).is_ok_and(|text| text.to_ascii_lowercase().contains("userknownhostsfile")) {
            let _ = write!(command, " -o UserKnownHostsFile={}", word(&ssh.join("known_hosts")));
        }
        for key in ["id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk"] {
            if ssh.join(key).is_file() {
                let _ = write!(command, " -i {}", word(&ssh.join(key)));
            }
        }
    }
    command
}

/// The home of this process's user in the table of users.
fn home_of_user() -> Option<PathBuf> {
    let id = rustix::process::geteuid().as_raw().to_string();
    let table = fs::read_to_string("/etc/passwd").ok()?;
    let line = table.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields.get(2) == Some(&id.as_str()))?;
    line.get(5).map(PathBuf::from)
}

fn is_local(url: &str) -> bool {
    url.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("file://"))
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// In full: SHA-1 or SHA-256.
fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && is_hex(text)
}

/// `https://host:port`
fn origin_of(url: &str) -> Option<&str> {
    let start = url.find("://")? + 3;
    let end = url[start..].find('/').map_or(url.len(), |n| start + n);
    Some(&url[..end])
}

/// Folders 0755, files 0755 or 0644: what git itself records. Without `.git`, the files that lead from submodules to it go, too.
fn normalise(dir: &Path, keep_git_dir: bool) -> std::io::Result<()> {
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if !keep_git_dir && entry.file_name() == ".git" {
                remove_tree(&entry.path())?;
            } else if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                let executable = entry.metadata()?.permissions().mode() & 0o100 != 0;
                fs::set_permissions(entry.path(), fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }))?;
            }
        }
    }
    Ok(())
}
