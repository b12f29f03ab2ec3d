//! What plugins do with images and servers: run something in an image, read its files, ask registries, download.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_engine::event::LogStream;
use ovenbird_engine::input::LocalContext;
use ovenbird_engine::{Cancel, Event, EventSink};
use ovenbird_oci::registry::{Client, RegistryError, web};
use ovenbird_oci::{Digest, Platform, beside};

use super::{Scene, veto};
use crate::builder::{Image, Job};
use crate::error::{Detail, Error, Kind};
use crate::request::{BuildRequest, Dest, Network, OutputKind, RemoteUrl, Source};
use crate::source::SourceTree;

/// Most bytes of output of a command in an image.
const MOST_OUTPUT: usize = 64 << 20;
/// How often waiting looks up.
const POLL: Duration = Duration::from_millis(20);

impl Scene<'_> {
    fn failed(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        let what = what.into();
        move |error| Error::from_chain(Kind::Veto, &error).while_doing(what)
    }

    /// Does something with servers, until it ends, the time of the plugin is over, or the build is cancelled.
    pub(crate) fn wait<T, E: Into<Error>, F: Future<Output = Result<T, E>>>(&self, work: F) -> Result<T, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(Self::failed("cannot start the network"))?;
        let deadline = Instant::now() + Duration::from_secs(self.timeout);
        runtime.block_on(async {
            let stopped = async {
                while !self.job.cancel.is_cancelled() && Instant::now() < deadline {
                    tokio::time::sleep(POLL).await;
                }
            };
            tokio::select! {
                done = work => done.map_err(Into::into),
                () = stopped => Err(self.out_of_time()),
            }
        })
    }

    fn out_of_time(&self) -> Error {
        if self.job.cancel.is_cancelled() {
            return Error::new(Kind::Cancelled, "it was stopped with the build");
        }
        veto(format!("it took longer than {} seconds and was stopped; give it more with timeout=", self.timeout))
    }

    /// Asks registries.
    pub(crate) fn ask<T, F: Future<Output = Result<T, RegistryError>>>(&self, work: impl FnOnce(Client) -> F) -> Result<T, Error> {
        self.wait(work(Client::new(self.bench.client.clone())))
    }

    /// Sleeps, unless the build is cancelled.
    pub(crate) fn sleep(&self, time: Duration) -> Result<(), Error> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            if self.job.cancel.is_cancelled() {
                return Err(self.out_of_time());
            }
            std::thread::sleep(POLL.min(time));
        }
        Ok(())
    }

    /// A folder of temporary files.
    pub(crate) fn folder(&self) -> Result<beside::Folder, Error> {
        beside::folder_in(&self.bench.temp).map_err(Self::failed("cannot make a temporary folder"))
    }

    /// The image of one platform.
    pub(crate) fn of_platform(image: &Image, platform: &Platform) -> Option<Image> {
        let (platform, manifest, config) = image.platforms.iter().find(|(known, _, _)| known == platform)?;
        Some(Image { target: manifest.clone(), platforms: vec![(platform.clone(), manifest.clone(), *config)], ..image.clone() })
    }

    /// Goes through the files of an image of one platform: path without `/` in front, and the entry.
    pub(crate) fn files(
        &self,
        image: &Image,
        visit: &mut dyn FnMut(&Path, &mut tar::Entry<'_, std::fs::File>) -> std::io::Result<()>,
    ) -> Result<(), Error> {
        let folder = self.folder()?;
        let path = folder.path().join("rootfs.tar");
        self.shop.export(image, &OutputKind::Tar(Dest::Path(path.clone())), &[], self.job)?;
        let mut read = || -> std::io::Result<()> {
            let mut archive = tar::Archive::new(std::fs::File::open(&path)?);
            for entry in archive.entries()? {
                let mut entry = entry?;
                let path: PathBuf = entry.path()?.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect();
                visit(&path, &mut entry)?;
            }
            Ok(())
        };
        read().map_err(Self::failed("cannot read the files of the image"))
    }

    /// Runs a command in an image of one platform, isolated like any step, and drops what it writes there. Its standard output comes back.
    pub(crate) fn run_in(&self, image: &Image, platform: &Platform, command: &[String], network: Network) -> Result<String, Error> {
        let folder = self.folder()?;
        let command = serde_json::to_string(command).map_err(|e| Error::from_chain(Kind::Bug, &e))?;
        let base = self.shop.as_base(image)?;
        let tree = SourceTree::inline(
            format!("FROM {base}\nRUN {command}\n"),
            &format!("Dockerfile of plugin {}", self.name),
            LocalContext::new(folder.path(), Patterns::default()),
        );
        let mut request = BuildRequest::new(Source::Path(folder.path().to_owned()));
        request.platforms = vec![platform.clone()];
        request.no_cache = true;
        request.network = network;
        request.limits = self.draft.request.limits.clone();
        let captured = Arc::new(Captured {
            inner: self.job.sink.clone(),
            output: Mutex::default(),
            prefix: format!("[{} {}]", self.phase, self.name),
        });
        let watched = Watched::over(self);
        let job = Job { sink: captured.clone(), cancel: watched.cancel.clone() };
        let result = self.shop.build(&tree, &request, &job);
        let late = watched.late.load(Ordering::SeqCst);
        drop(watched);
        match result {
            Ok(_) => Ok(std::mem::take(&mut *captured.output.lock().unwrap_or_else(PoisonError::into_inner))),
            Err(_) if late => Err(self.out_of_time()),
            Err(error) => match error.detail.as_deref() {
                Some(Detail::Step { code, tail, .. }) => {
                    let tail = tail.join(" / ");
                    Err(veto(format!(
                        "the command {command} failed in the image with code {code}{}{tail}",
                        if tail.is_empty() { "" } else { ": " }
                    )))
                }
                _ => Err(error),
            },
        }
    }

    /// Downloads a file of at most `most` bytes into `to`; gives its digest.
    pub(crate) fn download(
        &self,
        url: &str,
        to: &Path,
        most: u64,
        allowed: impl Fn(&reqwest::Url) -> bool + Send + Sync + 'static,
    ) -> Result<Digest, Error> {
        let shown = redacted(url);
        let failed = |why: String| veto(format!("cannot download {shown}: {why}"));
        self.wait(async {
            let mut response = web::client_for(allowed)?.get(url).send().await.map_err(|e| failed(plain(e)))?;
            if !response.status().is_success() {
                return Err(failed(format!("the server answers {}", response.status())));
            }
            let mut file = std::fs::File::create(to).map_err(|e| failed(e.to_string()))?;
            let mut hasher = ovenbird_oci::digest::Hasher::default();
            let mut size = 0;
            while let Some(chunk) = response.chunk().await.map_err(|e| failed(plain(e)))? {
                size += chunk.len() as u64;
                if size > most {
                    return Err(failed(format!("it is larger than {most} bytes")));
                }
                hasher.update(&chunk);
                std::io::Write::write_all(&mut file, &chunk).map_err(|e| failed(e.to_string()))?;
            }
            Ok::<_, Error>(hasher.finish().0)
        })
    }

    /// Posts JSON.
    pub(crate) fn post(&self, url: &str, body: &serde_json::Value, secret: Option<&[u8]>) -> Result<u16, Error> {
        let shown = redacted(url);
        self.wait(async {
            let mut request = web::client()?.post(url).header("content-type", "application/json").body(body.to_string());
            if let Some(secret) = secret {
                let token = String::from_utf8_lossy(secret.trim_ascii()).into_owned();
                request = request.bearer_auth(token);
            }
            let response = request.send().await.map_err(|e| veto(format!("cannot notify {shown}: {}", plain(e))))?;
            match response.status() {
                status if status.is_success() => Ok(status.as_u16()),
                status => Err(veto(format!("cannot notify {shown}: the server answers {status}"))),
            }
        })
    }
}

/// Reads an entry of at most `most` bytes.
pub(crate) fn read_entry(entry: &mut impl Read, most: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![];
    entry.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, format!("a file is larger than {most} bytes")));
    }
    Ok(bytes)
}

/// A URL without what may be a secret in it: user, password, query.
pub(crate) fn redacted(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or(url);
    RemoteUrl::parse(url).map_or_else(|| url.to_owned(), |url| url.split_credentials().1)
}

/// An error of the network, without the URL.
fn plain(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut told = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        told = format!("{told}: {next}");
        cause = next.source();
    }
    told
}

/// Passes on what a command says, and keeps its standard output.
struct Captured {
    inner: Arc<dyn EventSink>,
    output: Mutex<String>,
    prefix: String,
}

impl EventSink for Captured {
    fn emit(&self, event: Event) {
        match event {
            Event::Log { stream, text, .. } => {
                for line in text.lines() {
                    self.inner.emit(Event::Message { text: format!("{} {line}", self.prefix) });
                }
                let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
                if stream == LogStream::Stdout && output.len() + text.len() <= MOST_OUTPUT {
                    output.push_str(&text);
                }
            }
            Event::Warning { .. } | Event::Progress { .. } => self.inner.emit(event),
            // The steps of this build are none of the user's.
            _ => {}
        }
    }
}

/// A cancel of its own for a build within a plugin: set when the job is cancelled, or when the plugin's time is over.
struct Watched {
    cancel: Cancel,
    late: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
}

impl Watched {
    fn over(scene: &Scene) -> Self {
        let this = Self { cancel: Cancel::default(), late: Arc::default(), done: Arc::default() };
        let (cancel, late, done) = (this.cancel.clone(), this.late.clone(), this.done.clone());
        let (outer, limit) = (scene.job.cancel.clone(), Duration::from_secs(scene.timeout));
        std::thread::spawn(move || {
            let begin = Instant::now();
            while !done.load(Ordering::SeqCst) {
                if outer.is_cancelled() || begin.elapsed() > limit {
                    late.store(true, Ordering::SeqCst);
                    return cancel.cancel();
                }
                std::thread::sleep(POLL);
            }
        });
        this
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.done.store(true, Ordering::SeqCst);
    }
}
