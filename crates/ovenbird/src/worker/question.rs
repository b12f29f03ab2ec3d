//! What a worker asks its caller: secrets, certificates and credentials. The worker has none of its own.

use std::collections::{BTreeSet, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ovenbird_dockerfile::parse;
use ovenbird_engine::frontend::{Images, Lowered, lower};
use ovenbird_oci::Reference;
use ovenbird_oci::keychain::{self, Custodian, Keychain, KeychainOptions, Query, Question, Secret};
use ovenbird_oci::reference::is_host;
use serde_json::Value;

use super::wire::{Answered, Asked, Credential, MAX_RAW, Sender, ToCaller};
use crate::builder::options;
use crate::error::{Error, Kind};
use crate::request::{BuildRequest, CacheDest, CacheFrom, ContextSource, Phase};
use crate::settings::{Environment, Settings};
use crate::source::SourceTree;
use crate::workflow::desk::{self, At, Caller, Own, Target};

impl From<keychain::Credential> for Credential {
    fn from(credential: keychain::Credential) -> Self {
        match credential {
            keychain::Credential::Password { username, password } => Self::Password { username, password: password.expose().to_owned() },
            keychain::Credential::IdentityToken(token) => Self::IdentityToken(token.expose().to_owned()),
            keychain::Credential::RegistryToken(token) => Self::RegistryToken(token.expose().to_owned()),
        }
    }
}

impl From<Credential> for keychain::Credential {
    fn from(credential: Credential) -> Self {
        match credential {
            Credential::Password { username, password } => Self::Password { username, password: Secret::new(password) },
            Credential::IdentityToken(token) => Self::IdentityToken(Secret::new(token)),
            Credential::RegistryToken(token) => Self::RegistryToken(Secret::new(token)),
        }
    }
}

type Reply = (Answered, Vec<u8>);

/// The worker's side: questions that wait for their answers.
pub(crate) struct Questions {
    to: Arc<Sender>,
    next: AtomicU64,
    /// `None`: the caller is gone.
    waiting: Mutex<Option<HashMap<u64, mpsc::Sender<Reply>>>>,
}

impl Questions {
    pub(crate) fn new(to: Arc<Sender>) -> Self {
        Self { to, next: AtomicU64::new(1), waiting: Mutex::new(Some(HashMap::new())) }
    }

    /// Asks and waits.
    pub(crate) fn ask(&self, question: Asked) -> Result<Reply, String> {
        let gone = || "the caller is gone".to_owned();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answers) = mpsc::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut().ok_or_else(gone)?.insert(id, answer);
        self.to.send(&ToCaller::Ask { id, question }).map_err(|_| gone())?;
        match answers.recv() {
            Ok((Answered::Refused(reason), _)) => Err(reason),
            Ok(reply) => Ok(reply),
            Err(mpsc::RecvError) => Err(gone()),
        }
    }

    /// Asks for bytes.
    pub(crate) fn bytes(&self, question: Asked) -> Result<Vec<u8>, String> {
        match self.ask(question)? {
            (Answered::Bytes, bytes) => Ok(bytes),
            _ => Err("the caller gave something else".into()),
        }
    }

    /// Asks for bytes that may be more than one message holds.
    fn all_bytes(&self, question: Asked) -> Result<Vec<u8>, String> {
        let mut all = self.bytes(question)?;
        let mut last = all.len();
        while last == MAX_RAW && all.len() <= MOST_BYTES {
            let piece = self.bytes(Asked::More)?;
            last = piece.len();
            all.extend(piece);
        }
        if all.len() > MOST_BYTES { Err(format!("the caller gives more than {MOST_BYTES} bytes")) } else { Ok(all) }
    }

    /// An answer came. One that nobody waits for is dropped.
    pub(crate) fn answer(&self, id: u64, reply: Reply) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut().and_then(|waiting| waiting.remove(&id));
        if let Some(waiting) = waiting {
            let _ = waiting.send(reply);
        }
    }

    /// No more answers will come.
    pub(crate) fn close(&self) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The caller as the one who keeps the credentials, after a file of the worker's own place, when it has one.
    pub(crate) fn custodian(self: &Arc<Self>, file: Option<PathBuf>) -> Custodian {
        let this = Arc::clone(self);
        let own = file.map(|file| Keychain::new(KeychainOptions { auth_files: vec![file], ..KeychainOptions::default() }));
        let found = move |registry: &str, repository: &str, refused: Option<&keychain::Credential>| {
            // What the registry did not take is not given twice.
            own.as_ref()?.recorded(registry, repository).filter(|found| Some(found) != refused)
        };
        Custodian::new(move |question| {
            let known = match &question {
                Question::Find { registry, repository, refused, .. } => found(registry, repository, refused.as_ref()),
                Question::Recorded { registry, repository } => found(registry, repository, None),
                Question::Create { .. } => None,
            };
            if let Some(credential) = known {
                return Ok(keychain::Answer::Credential(credential, None));
            }
            let asked = match question {
                Question::Find { registry, repository, address, refused } => {
                    Asked::Credential { registry, repository, address, refused: refused.map(Into::into), recorded: false }
                }
                Question::Recorded { registry, repository } => {
                    Asked::Credential { registry, repository, address: None, refused: None, recorded: true }
                }
                Question::Create { registry, repository } => Asked::CreateRepository { registry, repository },
            };
            Ok(match this.ask(asked)?.0 {
                Answered::Credential { credential, expires } => keychain::Answer::Credential(
                    credential.into(),
                    expires.and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds))),
                ),
                Answered::Created(made) => keychain::Answer::Created(made),
                _ => keychain::Answer::Nothing,
            })
        })
    }
}

/// Largest answer, in bytes.
const MOST_BYTES: usize = 65 << 20;

/// Bytes of a file that go with one question.
const PIECE: usize = 1 << 20;

/// Most bytes of a question to a program.
const MOST_QUESTION: usize = 7 << 20;

/// The caller, for plugins.
pub(crate) struct OfCaller {
    questions: Arc<Questions>,
    absent: Vec<At>,
    /// One at a time: an answer may come in several pieces.
    turn: Mutex<()>,
}

impl OfCaller {
    pub(crate) fn new(questions: Arc<Questions>, absent: Vec<At>) -> Self {
        Self { questions, absent, turn: Mutex::default() }
    }
}

impl Caller for OfCaller {
    fn read(&self, plugin: At, path: &Path) -> Result<Vec<u8>, String> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.questions.all_bytes(Asked::ReadFile { plugin, path: path.to_owned() })
    }

    fn write(&self, plugin: At, target: &Target, content: &mut dyn Read) -> Result<(), String> {
        // What may not be written to later gets its permissions last.
        let plain = Target { mode: None, ..target.clone() };
        let ask = |target: &Target, piece: &[u8], more| {
            self.questions.ask(Asked::WriteFile { plugin, target: target.clone(), piece: STANDARD.encode(piece), more }).map(drop)
        };
        let mut more = false;
        loop {
            let mut piece = vec![];
            Read::take(&mut *content, PIECE as u64).read_to_end(&mut piece).map_err(|error| error.to_string())?;
            if piece.is_empty() && more {
                break;
            }
            ask(&plain, &piece, more)?;
            more = true;
        }
        if target.mode.is_some() { ask(target, &[], true) } else { Ok(()) }
    }

    fn run(&self, plugin: At, question: &Value) -> Result<Value, String> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if question.to_string().len() > MOST_QUESTION {
            return Err("what it would be told is too large for the pipe between the caller and a worker; build with --on here".into());
        }
        let answer = self.questions.all_bytes(Asked::RunProgram { plugin, question: question.clone() })?;
        serde_json::from_slice(&answer).map_err(|error| error.to_string())
    }

    fn is_absent(&self, plugin: At) -> bool {
        self.absent.contains(&plugin)
    }
}

/// Most questions of one build: each step and each blob may ask a few times.
const MAX_QUESTIONS: usize = 100_000;

/// The caller's side: answers what the request names, and nothing else.
pub(crate) struct Answers<'a> {
    request: &'a BuildRequest,
    settings: &'a Settings,
    environment: &'a Environment,
    keychain: Keychain,
    registries: BTreeSet<String>,
    tree: &'a SourceTree,
    own: Own<'a>,
    /// What is left of an answer that was too long for one message.
    left: Vec<u8>,
    asked: usize,
}

impl<'a> Answers<'a> {
    pub(crate) fn new(
        request: &'a BuildRequest,
        own: Own<'a>,
        settings: &'a Settings,
        environment: &'a Environment,
    ) -> Result<Self, Error> {
        let tree = own.tree;
        let keychain = settings.client_options().keychain();
        Ok(Self {
            request,
            settings,
            environment,
            keychain,
            registries: named(request, tree, settings)?,
            tree,
            own,
            left: vec![],
            asked: 0,
        })
    }

    /// The answer, and the bytes behind it.
    pub(crate) fn answer(&mut self, question: Asked) -> (Answered, Vec<u8>) {
        // Files have any number of pieces.
        self.asked += usize::from(!matches!(question, Asked::WriteFile { .. } | Asked::More));
        if self.asked > MAX_QUESTIONS {
            return (Answered::Refused("it asked too often".into()), vec![]);
        }
        match self.find(question) {
            Ok(answer) => answer,
            Err(reason) => (Answered::Refused(reason), vec![]),
        }
    }

    /// As much of it as goes into one message.
    fn piece_of(&mut self, mut bytes: Vec<u8>) -> (Answered, Vec<u8>) {
        self.left = bytes.split_off(bytes.len().min(MAX_RAW));
        (Answered::Bytes, bytes)
    }

    fn find(&mut self, question: Asked) -> Result<(Answered, Vec<u8>), String> {
        match question {
            Asked::Secret { id } => {
                let Some(spec) = self.request.secrets.iter().find(|spec| spec.id == id) else {
                    return Err(format!("the request has no secret {id:?}"));
                };
                let found = crate::builder::secrets(std::slice::from_ref(spec), self.environment).map_err(|error| error.to_string())?;
                let source = found.into_values().next().ok_or("there is none")?;
                let bytes = source.read().map_err(|error| format!("secret {id:?} cannot be read: {error}"))?;
                Ok((Answered::Bytes, bytes))
            }
            Asked::Login { host } => {
                let login = self.tree.logins.get(&host).ok_or_else(|| format!("no address of the request has a password for {host}"))?;
                Ok((Answered::Credential { credential: login.clone().into(), expires: None }, vec![]))
            }
            Asked::ClientIdentity { registry } => {
                self.check(&registry)?;
                let Some(path) = self.settings.registries.get(&registry).and_then(|options| options.client_identity.as_ref()) else {
                    return Err(format!("there is no client certificate for {registry}"));
                };
                let read = ovenbird_oci::regular_file::read(path, MAX_RAW as u64, ovenbird_oci::regular_file::Links::Follow);
                Ok((Answered::Bytes, read.map_err(|error| format!("cannot read {}: {error}", path.display()))?))
            }
            Asked::Credential { registry, repository, .. } if self.check(&registry).is_err() => {
                // A base image that only a trigger of another image names: it may be public.
                let _ = repository;
                Ok((Answered::Nothing, vec![]))
            }
            Asked::Credential { registry, repository, recorded: true, .. } => {
                let found = self.keychain.recorded(&registry, &repository);
                Ok((found.map_or(Answered::Nothing, |found| Answered::Credential { credential: found.into(), expires: None }), vec![]))
            }
            Asked::Credential { registry, repository, address, refused, recorded: false } => {
                let refused = refused.map(Into::into);
                let query = Query { registry: &registry, repository: &repository, address: address.as_deref(), refused: refused.as_ref() };
                let found = wait_for(self.keychain.find(query))?.map_err(|error| error.to_string())?;
                Ok((
                    found.map_or(Answered::Nothing, |found| {
                        let expires = found.expires.and_then(|end| end.duration_since(UNIX_EPOCH).ok()).map(|end| end.as_secs());
                        Answered::Credential { credential: found.credential.into(), expires }
                    }),
                    vec![],
                ))
            }
            Asked::ReadFile { plugin, path } => {
                let bytes = self.own.read(plugin, &path)?;
                Ok(self.piece_of(bytes))
            }
            Asked::WriteFile { plugin, target, piece, more } => {
                let piece = STANDARD.decode(piece).map_err(|error| error.to_string())?;
                self.own.write(plugin, &target, &piece, more)?;
                Ok((Answered::Nothing, vec![]))
            }
            Asked::RunProgram { plugin, question } => {
                let answer = self.own.run(plugin, question).map_err(|error| error.to_string())?;
                if let Some((request, tree)) = desk::as_changed(self.request, self.tree, &answer) {
                    // A Dockerfile that cannot be read names nothing more; the worker says what is wrong.
                    self.registries.extend(named(&request, &tree, self.settings).unwrap_or_default());
                }
                Ok(self.piece_of(answer.to_string().into_bytes()))
            }
            Asked::More => {
                let bytes = std::mem::take(&mut self.left);
                Ok(self.piece_of(bytes))
            }
            Asked::CreateRepository { registry, repository } => {
                self.check(&registry)?;
                let made = wait_for(self.keychain.create_repository(&registry, &repository))?.map_err(|error| error.to_string())?;
                Ok((Answered::Created(made), vec![]))
            }
        }
    }

    fn check(&self, registry: &str) -> Result<(), String> {
        if self.registries.contains(registry) { Ok(()) } else { Err(format!("the request does not name the registry {registry}")) }
    }
}

fn wait_for<T>(work: impl Future<Output = T>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    Ok(runtime.block_on(work))
}

/// Registries that a request names: of its names and caches, of the images of its Dockerfile, and the mirrors and endpoints of those.
fn named(request: &BuildRequest, tree: &SourceTree, settings: &Settings) -> Result<BTreeSet<String>, Error> {
    let mut registries = BTreeSet::new();
    let mut beside_names = vec![];
    let mut add = |name: &str| {
        // Variables stand behind the registry.
        let plain = name.split(['{', '@']).next().unwrap_or_default().trim_end_matches(['/', ':', '-', '.', '_']);
        if let Ok(reference) = plain.parse::<Reference>() {
            registries.insert(reference.registry().to_owned());
        }
    };
    request.names.iter().chain(request.outputs.iter().flat_map(|output| &output.names)).for_each(|name| add(name));
    for from in &request.cache_from {
        if let CacheFrom::Registry(name) = from {
            add(name);
        }
    }
    for to in &request.cache_to {
        if let CacheDest::Registry(name) = &to.dest {
            add(name);
        }
    }
    for context in request.contexts.values() {
        if let ContextSource::Image(name) = context {
            add(name.strip_prefix("docker-image://").unwrap_or(name));
        }
    }
    for text in plugins_names(request) {
        match text.split('/').next().filter(|host| text == *host && is_host(host)) {
            Some(host) => beside_names.push(host.to_owned()),
            None => add(&text),
        }
    }
    let parsed = parse(&tree.dockerfile);
    for options in options(tree, request)? {
        // The first round asks for every image that the Dockerfile itself names. A wrong Dockerfile names none: the worker says what is wrong.
        if let Ok(Lowered::Needs(images)) = lower(&parsed.dockerfile, &tree.dockerfile, &options, &Images::default()) {
            for image in images {
                add(&image.name);
            }
        }
    }
    registries.extend(beside_names);
    let beside: Vec<String> = registries
        .iter()
        .filter_map(|registry| settings.registries.get(registry))
        .flat_map(|options| options.mirrors.iter().chain(&options.endpoint))
        .map(|address| {
            let bare = address.split_once("://").map_or(address.as_str(), |(_, rest)| rest);
            bare.split('/').next().unwrap_or_default().to_owned()
        })
        .collect();
    registries.extend(beside);
    Ok(registries)
}

/// Plugins whose arguments name images, repositories and registries.
const WITH_NAMES: [&str; 6] = ["bump-release", "change-from", "group-manifests", "parent-wait", "push-all", "tag-from-config"];

/// Every text in the arguments of those plugins.
fn plugins_names(request: &BuildRequest) -> Vec<String> {
    let entries = Phase::ALL.into_iter().flat_map(|phase| request.workflow.entries(phase));
    let entries = entries.filter(|entry| entry.file.is_none() && WITH_NAMES.contains(&entry.name.as_str()));
    let (mut texts, mut open) = (vec![], vec![]);
    for entry in entries {
        texts.extend(entry.typed.iter().map(|(_, value)| value.clone()));
        open.extend(entry.args.values());
    }
    while let Some(value) = open.pop() {
        match value {
            Value::String(text) => texts.push(text.clone()),
            Value::Array(items) => open.extend(items),
            Value::Object(fields) => open.extend(fields.values()),
            _ => {}
        }
    }
    texts
}

/// For a caller's error.
pub(crate) fn refused(what: &str, reason: String) -> Error {
    Error::new(Kind::Source, format!("the worker cannot have {what}")).because(reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::Job;
    use crate::request::Source;
    use crate::request::workflow::Entry;
    use crate::source::Fetcher;
    use crate::workflow::{Bench, Flow};
    use ovenbird_engine::Cancel;
    use ovenbird_engine::event::Silent;

    #[test]
    fn what_the_request_does_not_name_is_not_given() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, b"hunter2\xff").unwrap();
        std::fs::write(
            dir.path().join("Dockerfile"),
            "ARG R=base.test:5000\nFROM ${R}/a:1 AS x\nFROM scratch\nCOPY --from=x / /\nCOPY --from=other.test/b / /\n",
        )
        .unwrap();
        let auths = r#"{"auths":{"base.test:5000":{"auth":"dTpw"},"push.test":{"auth":"dTpw"},"secret.test":{"auth":"dTpw"},"plugin.test":{"auth":"dTpw"},"other.test":{"auth":"dTpw"}}}"#;
        std::fs::write(dir.path().join("config.json"), auths).unwrap();
        let variables = [("HOME", "/nowhere"), ("DOCKER_CONFIG", dir.path().to_str().unwrap())];
        let environment = Environment::fixed(variables.map(|(k, v)| (k.to_owned(), v.to_owned())).into(), "/", None);
        let settings = Settings::load(&environment, &crate::settings::Overrides::default()).unwrap();
        let mut request = BuildRequest::new(Source::Path(dir.path().into()));
        request.names = vec!["push.test/app:{git.sha}".into()];
        request.secrets = vec![format!("id=token,src={}", file.display()).parse().unwrap()];
        let job = Job { sink: Arc::new(Silent), cancel: Cancel::default() };
        let tree = Fetcher::new(&settings, &environment).fetch(&request, &mut std::io::empty(), &job).unwrap();
        let mut labels = Entry::new("labels");
        labels.args.insert("set".into(), serde_json::json!({}));
        request.workflow.push(Phase::PreBuild, labels);
        let mut push = Entry::new("push-all");
        push.args.insert("registries".into(), serde_json::json!(["plugin.test/team"]));
        request.workflow.push(Phase::PreBuild, push);
        let mut store = Entry::new("store-metadata");
        store.args.insert("dest".into(), "stored".into());
        request.workflow.push(Phase::Exit, store);
        let bench = Bench::new(&settings, &environment);
        let flow = Flow::prepare(&request, &bench, &job).unwrap();
        let mut answers = Answers::new(&request, Own { flow: &flow, tree: &tree, job: &job }, &settings, &environment).unwrap();
        let mut told = |question| match answers.answer(question) {
            (Answered::Bytes, bytes) => format!("{} bytes", bytes.len()),
            (Answered::Credential { .. }, _) => "credential".into(),
            (Answered::Nothing, _) => "nothing".into(),
            (Answered::Created(made), _) => format!("created {made}"),
            (Answered::Refused(reason), _) => format!("! {reason}"),
        };
        let credential = |registry: &str, recorded| Asked::Credential {
            registry: registry.into(),
            repository: "a".into(),
            address: None,
            refused: None,
            recorded,
        };
        assert_eq!(told(Asked::Secret { id: "token".into() }), "8 bytes");
        // Files and programs of this machine: what the request's own plugins name, and nothing else.
        let file = |dest: &str, inside: Option<&str>| Target { dest: dest.into(), inside: inside.map(Into::into), mode: None };
        let exit = At { phase: Phase::Exit, place: 0 };
        let write = |plugin, target| Asked::WriteFile { plugin, target, piece: STANDARD.encode("x"), more: false };
        for (question, expect) in [
            (write(exit, file("/etc/passwd", None)), "! no argument of the plugin names it"),
            (write(exit, file("stored/x", None)), "! no argument of the plugin names it"),
            (write(exit, file("../linux_amd64-stored", None)), "! no argument of the plugin names it"),
            (write(exit, file("stored", Some("x"))), "! the plugin does not write such a file"),
            (write(exit, file("evil-stored", None)), "! no argument of the plugin names it"),
            (write(At { phase: Phase::PreBuild, place: 0 }, file("stored", None)), "! the plugin writes no file"),
            (write(At { phase: Phase::Exit, place: 7 }, file("stored", None)), "! the request has no such plugin"),
            (Asked::ReadFile { plugin: exit, path: "/etc/shadow".into() }, "! no argument of the plugin names it"),
            (
                Asked::RunProgram { plugin: exit, question: serde_json::json!({}) },
                "! the worker asks for a program that the request does not name",
            ),
        ] {
            assert_eq!(told(question), expect);
        }
        assert_eq!(told(Asked::Secret { id: "other".into() }), "! the request has no secret \"other\"");
        assert_eq!(told(Asked::Secret { id: "/etc/shadow".into() }), "! the request has no secret \"/etc/shadow\"");
        for (registry, expect) in [
            ("base.test:5000", "credential"),
            ("other.test", "credential"),
            ("push.test", "credential"),
            ("plugin.test", "credential"),
            ("secret.test", "nothing"),
            ("docker.io", "nothing"),
        ] {
            assert_eq!((told(credential(registry, false)), told(credential(registry, true))), (expect.into(), expect.into()), "{registry}");
        }
        assert_eq!(
            told(Asked::CreateRepository { registry: "secret.test".into(), repository: "a".into() }),
            "! the request does not name the registry secret.test"
        );
    }
}
