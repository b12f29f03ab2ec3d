//! A whole source as an artifact in a registry: the Dockerfile and every context of a build, for places that nothing can be streamed to.
//!
//! A context is a tar that is cut where its bytes say, so that a changed file moves few cuts. Each piece is a blob under its digest: what
//! the registry has is not sent again. The config of the artifact has the Dockerfile, and says which pieces belong to which context.
//! Invariant: what is unpacked is what the caller's disk had, as far as an image can show it; so the digests of builds are the same.

use std::collections::BTreeMap;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_engine::Event;
use ovenbird_engine::ops::file::decompress;
use ovenbird_oci::image::media;
use ovenbird_oci::layer::{self, Compression};
use ovenbird_oci::registry::{Client, ProgressFn};
use ovenbird_oci::store::Store;
use ovenbird_oci::{Descriptor, Digest, Manifest, Reference};
use serde::{Deserialize, Serialize};

use super::{Fetcher, SourceError, SourceTree};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::request::RemoteUrl;
use crate::worker::folder::{self, SendError};

/// Media type of the config: what makes an artifact a source.
pub(super) const CONFIG: &str = "application/vnd.ovenbird.source.v1+json";

/// Media type of a piece.
const PIECE: &str = "application/vnd.ovenbird.source.piece.v1.tar+zstd";

/// Version of [`Config`].
const VERSION: u32 = 1;

/// Fast: a context is read once.
const COMPRESSION: Compression = Compression::Zstd(1);

/// Shortest and longest piece, in bytes of the tar.
const SIZES: (usize, usize) = (256 << 10, 4 << 20);

/// How many bits of the rolling hash must be 0 at a cut: a MiB on average, beside the shortest.
const CUT: u32 = 20;

/// Largest config: the Dockerfile is in it.
const MAX_CONFIG: u64 = 32 << 20;

/// Most contexts.
const MAX_CONTEXTS: usize = 1000;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    version: u32,
    dockerfile: Dockerfile,
    /// In the order of their pieces.
    contexts: Vec<Context>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Dockerfile {
    name: String,
    text: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Context {
    name: String,
    /// Its ignore file; what that leaves out is not there.
    ignore: Vec<String>,
    pieces: usize,
}

/// What was unpacked.
#[derive(Debug)]
pub(super) struct Bundle {
    /// Name and text.
    pub(super) dockerfile: (String, String),
    /// By name.
    pub(super) contexts: BTreeMap<String, (PathBuf, Patterns)>,
}

/// Puts a source into a repository, under its digest alone. Gives the name that a request can have as its source.
pub(crate) fn push(fetcher: &Fetcher, tree: &SourceTree, repository: &Reference, job: &Job) -> Result<RemoteUrl, Error> {
    let settings = fetcher.settings.as_ref().ok_or_else(|| Error::new(Kind::Bug, "registries are not set up here"))?;
    let folder = fetcher.folder()?;
    let store = Store::open(folder.path())?;
    let (mut contexts, mut layers) = (vec![], vec![]);
    for (name, context) in &tree.contexts {
        let pieces = pack(&context.dir, &context.ignore, &store, job)?;
        contexts.push(Context { name: name.clone(), ignore: context.ignore.written().map(Into::into).collect(), pieces: pieces.len() });
        layers.extend(pieces);
    }
    let dockerfile = Dockerfile { name: tree.dockerfile_name.clone(), text: tree.dockerfile.clone() };
    let config = put(&store, CONFIG, &Config { version: VERSION, dockerfile, contexts })?;
    let bytes: u64 = layers.iter().map(|layer| layer.size).sum();
    let media_type = Some(media::OCI_MANIFEST.to_owned());
    let manifest = Manifest { schema_version: 2, media_type, config, layers, annotations: BTreeMap::new() };
    let target = put(&store, media::OCI_MANIFEST, &manifest)?;
    let name = format!("{}/{}@{}", repository.registry(), repository.repository(), target.digest);
    let to: Reference = name.parse()?;
    let progress: ProgressFn = {
        let (sink, shown) = (Arc::clone(&job.sink), format!("{}/{}", repository.registry(), repository.repository()));
        Arc::new(move |digest: &Digest, current, total| {
            let label = format!("sending the source to {shown}, piece {}", digest.short());
            sink.emit(Event::Progress { id: format!("source {digest}"), label, current, total: Some(total), done: current >= total });
        })
    };
    let client = Client::new(settings.client_options());
    let message =
        format!("sending the source to {}/{} ({} in {} pieces)", to.registry(), to.repository(), size(bytes), manifest.layers.len());
    job.sink.emit(Event::Message { text: message });
    fetcher
        .until_cancelled(job, async { Ok(client.push(&store, &target, &to, &BTreeMap::new(), &progress).await?) })
        .map_err(|error| error.while_doing(format!("cannot put the source of the build into {}/{}", to.registry(), to.repository())))?;
    RemoteUrl::parse(&format!("oci://{name}")).ok_or_else(|| Error::new(Kind::Bug, format!("{name} is no address")))
}

fn size(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{} KiB", bytes.div_ceil(1 << 10)) } else { format!("{} MiB", bytes >> 20) }
}

fn put(store: &Store, media_type: &str, document: &impl Serialize) -> Result<Descriptor, Error> {
    let bytes = serde_json::to_vec(document).map_err(|error| Error::from_chain(Kind::Bug, &error))?;
    Ok(Descriptor::new(media_type, store.write(&bytes)?, bytes.len() as u64))
}

/// The pieces of one folder, in the store.
fn pack(dir: &Path, ignore: &Patterns, store: &Store, job: &Job) -> Result<Vec<Descriptor>, Error> {
    let (from, mut pipe) = io::pipe().map_err(|error| Error::from_chain(Kind::Source, &error))?;
    std::thread::scope(|scope| {
        let sends = scope.spawn(move || {
            let mut pipe = io::BufWriter::with_capacity(64 << 10, &mut pipe);
            folder::send(dir, ignore.clone(), &mut pipe).and_then(|()| pipe.flush().map_err(SendError::Pipe))
        });
        let mut cutter = Cutter::new(from);
        let mut pieces = vec![];
        let mut work = || -> Result<(), Error> {
            while let Some(piece) = cutter.next().map_err(|error| Error::from_chain(Kind::Source, &error))? {
                if job.cancel.is_cancelled() {
                    return Err(Error::new(Kind::Cancelled, "the build was cancelled"));
                }
                let packed = layer::repack(piece.as_slice(), COMPRESSION, 1, store)
                    .map_err(|error| Error::from_chain(Kind::Configuration, &error).while_doing("cannot pack the build context"))?;
                pieces.push(Descriptor::new(PIECE, packed.digest, packed.size));
            }
            Ok(())
        };
        let worked = work();
        drop(cutter);
        match sends.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
            Err(SendError::Read { path, source }) => {
                Err(Error::from_chain(Kind::Source, &source).while_doing(format!("cannot read {path} of the build context")))
            }
            // Who stopped reading says why.
            Ok(()) | Err(SendError::Pipe(_)) => worked.map(|()| pieces),
        }
    })
}

/// Unpacks a source below `into`. Its blobs are in the store.
pub(super) fn unpack(manifest: &Manifest, store: &Store, into: &Path, url: &RemoteUrl) -> Result<Bundle, Error> {
    let wrong = |reason: String| Error::from(SourceError::Remote { url: url.to_string(), reason });
    let config: Config = serde_json::from_slice(&store.read(&manifest.config.digest)?)
        .map_err(|error| wrong(format!("its config cannot be read: {error}")))?;
    if config.version != VERSION {
        return Err(wrong(format!("it is a source of version {}, and this program reads version {VERSION}", config.version))
            .hint("install the same version of ovenbird at both ends"));
    }
    let pieces = config.contexts.iter().try_fold(0usize, |sum, context| sum.checked_add(context.pieces));
    if config.contexts.len() > MAX_CONTEXTS || pieces != Some(manifest.layers.len()) {
        return Err(wrong("its config and its layers do not belong together".into()));
    }
    let cannot = |source| Error::from(SourceError::Read { what: into.display().to_string(), source });
    std::fs::create_dir(into).map_err(cannot)?;
    let (mut contexts, mut layers) = (BTreeMap::new(), manifest.layers.as_slice());
    for (at, Context { name, ignore, pieces }) in config.contexts.into_iter().enumerate() {
        let (own, rest) = layers.split_at(pieces);
        layers = rest;
        let dir = into.join(at.to_string());
        std::fs::create_dir(&dir).map_err(cannot)?;
        let joined = Joined { store, pieces: own, open: None };
        let (dir, _) = folder::receive(joined, &dir)
            .map_err(|error| wrong(format!("the build context {name:?} cannot be unpacked: {}", error.of_archive())))?;
        let ignore = Patterns::new(&ignore).map_err(|error| wrong(error.to_string()))?;
        contexts.insert(name, (dir, ignore));
    }
    Ok(Bundle { dockerfile: (config.dockerfile.name, config.dockerfile.text), contexts })
}

/// Is this the config of a source, and one that can be read at once?
pub(super) fn is_source(manifest: &Manifest) -> bool {
    manifest.config.media_type == CONFIG && manifest.config.size <= MAX_CONFIG
}

/// Pieces, one after the other, as the tar that they are of.
struct Joined<'a> {
    store: &'a Store,
    pieces: &'a [Descriptor],
    open: Option<Box<dyn Read>>,
}

impl Read for Joined<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(open) = &mut self.open {
                match open.read(buffer) {
                    Ok(0) if !buffer.is_empty() => self.open = None,
                    read => return read,
                }
            }
            let Some((first, rest)) = self.pieces.split_first() else { return Ok(0) };
            self.open = Some(decompress(self.store.open_blob(&first.digest).map_err(io::Error::other)?)?);
            self.pieces = rest;
        }
    }
}

/// Random numbers for the bytes; the same ones for ever, or every piece is another.
const GEAR: [u64; 256] = {
    let (mut table, mut at, mut state) = ([0; 256], 0, 0u64);
    while at < 256 {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        table[at] = z ^ (z >> 31);
        at += 1;
    }
    table
};

/// Cuts a stream where the last 64 bytes say, so that a change leaves the cuts behind it where they are.
struct Cutter<R> {
    from: R,
    /// What was read and not given.
    buffer: Vec<u8>,
}

impl<R: Read> Cutter<R> {
    fn new(from: R) -> Self {
        Self { from, buffer: vec![] }
    }

    /// The next piece; `None` at the end.
    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let (shortest, longest) = SIZES;
        let missing = longest.saturating_sub(self.buffer.len()) as u64;
        (&mut self.from).take(missing).read_to_end(&mut self.buffer)?;
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let mut hash = 0u64;
        let mut cut = self.buffer.len().min(longest);
        for (at, byte) in self.buffer.iter().enumerate().take(cut).skip(shortest.saturating_sub(64)) {
            hash = (hash << 1).wrapping_add(GEAR[usize::from(*byte)]);
            if at + 1 >= shortest && hash >> (64 - CUT) == 0 {
                cut = at + 1;
                break;
            }
        }
        let rest = self.buffer.split_off(cut);
        Ok(Some(std::mem::replace(&mut self.buffer, rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut cutter = Cutter::new(bytes);
        std::iter::from_fn(|| cutter.next().unwrap()).collect()
    }

    /// Bytes without a pattern.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 7u64;
        let step = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..length).map(step).collect()
    }

    #[test]
    fn a_change_moves_few_cuts() {
        let bytes = noise(10 << 20);
        let whole = pieces(&bytes);
        assert_eq!(whole.concat(), bytes);
        assert!(whole.len() > 3 && whole.iter().rev().skip(1).all(|piece| (SIZES.0..=SIZES.1).contains(&piece.len())), "{}", whole.len());
        let mut changed = bytes.clone();
        changed.splice(4 << 20..4 << 20, *b"one more line");
        let known: std::collections::BTreeSet<_> = whole.iter().collect();
        let new = pieces(&changed).iter().filter(|piece| !known.contains(piece)).count();
        assert!(new <= 2, "{new} of {} pieces are new", whole.len());
        assert!(pieces(b"").is_empty() && pieces(&[0; 10 << 20]).len() == 3);
    }

    #[test]
    fn what_is_unpacked_is_what_was_packed() {
        let dir = tempfile::tempdir().unwrap();
        let (from, job) =
            (dir.path().join("from"), Job { sink: Arc::new(ovenbird_engine::event::Silent), cancel: ovenbird_engine::Cancel::default() });
        std::fs::create_dir_all(from.join("deep/empty")).unwrap();
        std::fs::write(from.join("big"), noise(6 << 20)).unwrap();
        std::fs::write(from.join("ignored"), "x").unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let ignore = Patterns::parse("ignored").unwrap();
        let layers = pack(&from, &ignore, &store, &job).unwrap();
        assert!(layers.len() > 1);
        assert_eq!(pack(&from, &ignore, &store, &job).unwrap(), layers, "the same folder, the same pieces");
        let context = |pieces| Context { name: "context".into(), ignore: vec!["ignored".into()], pieces };
        let dockerfile = || Dockerfile { name: "D".into(), text: "FROM scratch".into() };
        let manifest = |config: &Config| Manifest {
            schema_version: 2,
            media_type: None,
            config: put(&store, CONFIG, config).unwrap(),
            layers: layers.clone(),
            annotations: BTreeMap::new(),
        };
        let url = RemoteUrl::parse("oci://r.test/a").unwrap();
        let good = manifest(&Config { version: VERSION, dockerfile: dockerfile(), contexts: vec![context(layers.len())] });
        assert!(is_source(&good));
        let bundle = unpack(&good, &store, &dir.path().join("to"), &url).unwrap();
        let (got, patterns) = &bundle.contexts["context"];
        assert_eq!(std::fs::read(got.join("big")).unwrap(), noise(6 << 20));
        assert!(got.join("deep/empty").is_dir() && !got.join("ignored").exists() && patterns.is_ignored("ignored"));
        for (number, (config, expect)) in [
            (Config { version: 2, dockerfile: dockerfile(), contexts: vec![context(layers.len())] }, "a source of version 2"),
            (Config { version: VERSION, dockerfile: dockerfile(), contexts: vec![context(1)] }, "do not belong together"),
            (
                Config { version: VERSION, dockerfile: dockerfile(), contexts: vec![context(usize::MAX), context(2)] },
                "do not belong together",
            ),
            (
                Config { version: VERSION, dockerfile: dockerfile(), contexts: vec![context(1), context(layers.len() - 1)] },
                "cannot be unpacked",
            ),
        ]
        .into_iter()
        .enumerate()
        {
            let error = unpack(&manifest(&config), &store, &dir.path().join(number.to_string()), &url).unwrap_err();
            assert!(error.to_string().contains(expect), "{error}");
        }
    }
}
