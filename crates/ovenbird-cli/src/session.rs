//! What most commands begin with: settings, and an engine over the state directory.

use std::io::IsTerminal as _;
use std::sync::Arc;

use ovenbird::settings::{Overrides, Progress as Mode};
use ovenbird::source::Fetcher;
use ovenbird::suggest;
use ovenbird::{EngineBuilder, Environment, Error, Job, Kind, Settings};
use ovenbird_engine::Cancel;
use ovenbird_oci::store::Store;
use ovenbird_oci::{Descriptor, Digest, Reference};
use ovenbird_sandbox::{Level, LevelStatus};

use crate::progress::{self, Progress};
use crate::signal;

/// Settings in force and the environment they came from.
pub(crate) struct Session {
    pub(crate) environment: Environment,
    pub(crate) settings: Settings,
}

impl Session {
    pub(crate) fn new(environment: Environment, flags: &Overrides) -> Result<Self, Error> {
        let settings = Settings::load(&environment, flags)?;
        Ok(Self { environment, settings })
    }

    /// An engine that can run steps. Enters the isolation level: this process must still have one thread.
    pub(crate) fn sandboxed(&self) -> Result<EngineBuilder, Error> {
        let (level, overlay) = self.enter()?;
        EngineBuilder::open(&self.settings, &self.environment, level, overlay)
    }

    /// Enters nothing: somebody else runs the steps.
    pub(crate) fn outside(&self) -> Result<(Option<Level>, bool), Error> {
        self.make_root().map(|()| (None, false))
    }

    /// Enters the isolation level: this process must still have one thread. Which it is, and whether overlay mounts work there.
    pub(crate) fn enter(&self) -> Result<(Option<Level>, bool), Error> {
        self.make_root()?;
        let status = match self.settings.isolation_level {
            Some(level) => Some(require(ovenbird_sandbox::probe::probe_level(level, &self.settings.root))?),
            None => ovenbird_sandbox::probe::probe(&self.settings.root).best().cloned(),
        };
        if let Some(status) = &status {
            ovenbird_sandbox::enter(status.level)?;
        }
        Ok((status.as_ref().map(|s| s.level), status.is_some_and(|s| s.overlay)))
    }

    /// An engine for images only: it runs nothing and enters nothing.
    pub(crate) fn images_only(&self) -> Result<EngineBuilder, Error> {
        self.make_root()?;
        EngineBuilder::open(&self.settings, &self.environment, None, false)
    }

    /// An image of the store by name, by digest (`sha256:…`) or by the first digits of one that has a name.
    pub(crate) fn find(&self, store: &Store, text: &str) -> Result<Descriptor, Error> {
        find(store, text, &self.settings)
    }

    /// Names as they were typed, in full.
    pub(crate) fn references(&self, names: &[String]) -> Result<Vec<Reference>, Error> {
        names.iter().map(|name| self.settings.reference(name)).collect()
    }

    /// What fetches sources for this user.
    pub(crate) fn sources(&self) -> Fetcher {
        Fetcher::new(&self.settings, &self.environment)
    }

    fn make_root(&self) -> Result<(), Error> {
        let root = &self.settings.root;
        std::fs::create_dir_all(root).map_err(|error| {
            Error::from_chain(Kind::Configuration, &error)
                .while_doing(format!("cannot make the state directory {}", root.display()))
                .hint("give another one with --root DIR or OVENBIRD_ROOT")
        })
    }

    /// Progress display and signal watch. Makes threads: call it after [`Session::sandboxed`].
    pub(crate) fn start(&self, quiet: bool, explain: bool) -> (Progress, Job) {
        let cancel = Cancel::default();
        signal::watch(&cancel);
        let mode = match self.settings.progress {
            _ if quiet => Mode::Quiet,
            Mode::Auto if std::io::stderr().is_terminal() && self.environment.get("TERM") != Some("dumb") => Mode::Tty,
            Mode::Auto => Mode::Plain,
            mode => mode,
        };
        let progress = progress::start(mode, self.environment.get("NO_COLOR").is_some_and(|v| !v.is_empty()), explain);
        let job = Job { sink: Arc::clone(progress.sink()), cancel };
        (progress, job)
    }
}

/// A level that was asked for must work.
fn require(status: LevelStatus) -> Result<LevelStatus, Error> {
    if status.usable {
        return Ok(status);
    }
    let mut error = Error::new(Kind::Sandbox, format!("the isolation level {} is not possible on this machine", status.level.name()));
    error.hints = status.missing;
    Err(error.hint("`ovenbird doctor` shows what works here"))
}

/// Finds an image of the store by name, by digest (`sha256:…`) or by the first digits of one that has a name.
fn find(store: &Store, text: &str, settings: &Settings) -> Result<Descriptor, Error> {
    let images = store.images()?;
    if let Ok(digest) = text.parse::<Digest>() {
        if let Some((_, found)) = images.iter().find(|(_, d)| d.digest == digest) {
            return Ok(found.clone());
        }
        if store.has(&digest) {
            let bytes = store.read(&digest)?;
            let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
            if let Some(media_type) = json["mediaType"].as_str().filter(|m| m.contains("manifest") || m.contains("index")) {
                let size = bytes.len() as u64;
                return Ok(Descriptor { media_type: media_type.into(), digest, size, platform: None, annotations: [].into() });
            }
        }
        return Err(Error::new(Kind::Usage, format!("there is no image {text} on this machine")));
    }
    if text.len() >= 6 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        let mut found: Vec<_> = images.iter().filter(|(_, d)| d.digest.hex().starts_with(text)).map(|(_, d)| d).collect();
        found.dedup_by_key(|d| d.digest);
        match found.as_slice() {
            [] => {}
            [one] => return Ok((*one).clone()),
            _ => return Err(Error::new(Kind::Usage, format!("{text} is the beginning of several digests")).hint("give more digits")),
        }
    }
    let name = settings.reference(text)?;
    if let Some(found) = store.resolve(&name)? {
        return Ok(found);
    }
    let error = Error::new(Kind::Usage, format!("there is no image {} on this machine", name.familiar()));
    let names: Vec<String> = images.iter().map(|(name, _)| name.familiar()).collect();
    Err(match suggest::nearest(&name.familiar(), names.iter().map(String::as_str)) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint(format!("`ovenbird images` lists them; `ovenbird pull {}` fetches it", name.familiar())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forced_levels() {
        let status = |usable| LevelStatus { level: Level::Root, usable, overlay: usable, missing: vec!["not root".into()] };
        assert!(require(status(true)).is_ok());
        let error = require(status(false)).unwrap_err();
        assert_eq!((error.kind, error.hints[0].as_str()), (Kind::Sandbox, "not root"));
    }
}
