//! Images of an engine: looked at, named, loaded, saved, removed.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use bollard::query_parameters as query;
use bytes::Bytes;
use futures_util::StreamExt as _;
use ovenbird_engine::Cancel;
use ovenbird_oci::{Digest, Reference};
use tokio::sync::mpsc;

use super::{DockerEngine, DockerEngineError};

/// Pieces of an archive that wait to be read.
const WAITING: usize = 16;

/// An image that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    /// Its id: the digest of its config, of its manifest where the engine keeps images in containerd.
    pub id: String,
    /// Its names.
    pub names: Vec<String>,
    /// `REPOSITORY@DIGEST` of where it came from or went.
    pub digests: Vec<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Bytes.
    pub size: i64,
}

impl DockerEngine {
    /// Does it have an image with this name or id?
    pub fn image_exists(&self, name: &str) -> Result<bool, DockerEngineError> {
        match self.inspect_image(name) {
            Err(error) if error.is_not_found() => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// All that the engine knows of an image, as it tells it.
    pub fn inspect_image(&self, name: &str) -> Result<serde_json::Value, DockerEngineError> {
        let found = self.ask("image inspection", async |client| client.inspect_image(name).await)?;
        Ok(serde_json::to_value(found).unwrap_or_default())
    }

    /// Images with a name like this (`*` stands for anything but `/`), all when it is empty.
    pub fn images(&self, name: &str) -> Result<Vec<ImageSummary>, DockerEngineError> {
        let filters = (!name.is_empty()).then(|| [("reference".to_owned(), vec![name.to_owned()])].into());
        let options = query::ListImagesOptions { filters, ..query::ListImagesOptions::default() };
        let found = self.ask("image list", async |client| client.list_images(Some(options)).await)?;
        let summary = |image: bollard::models::ImageSummary| ImageSummary {
            id: image.id,
            names: image.repo_tags.into_iter().filter(|name| name != "<none>:<none>").collect(),
            digests: image.repo_digests.into_iter().filter(|name| name != "<none>@<none>").collect(),
            labels: image.labels.into_iter().collect(),
            size: image.size,
        };
        Ok(found.into_iter().map(summary).collect())
    }

    /// Its history, oldest first: what made each part, when (seconds since 1970), and a remark.
    pub fn image_history(&self, name: &str) -> Result<Vec<(String, i64, String)>, DockerEngineError> {
        let mut lines = self.ask("image history", async |client| client.image_history(name).await)?;
        lines.reverse();
        Ok(lines.into_iter().map(|line| (line.created_by, line.created, line.comment)).collect())
    }

    /// Names an image it has, by id or name.
    pub fn tag(&self, image: &str, name: &Reference) -> Result<(), DockerEngineError> {
        let options = query::TagImageOptions { repo: Some(repository(name)), tag: Some(name.tag().unwrap_or("latest").into()) };
        self.ask("tag", async |client| client.tag_image(image, Some(options)).await)
    }

    /// Removes a name, and the image with its last one.
    pub fn remove_image(&self, name: &str, force: bool) -> Result<(), DockerEngineError> {
        let options = query::RemoveImageOptions { force, ..query::RemoveImageOptions::default() };
        self.ask("image removal", async |client| client.remove_image(name, Some(options), None).await.map(drop))
    }

    /// Loads a docker archive that `archive` writes; it never is on a disk on the way. Gives the engine's words.
    pub fn load(
        &self,
        cancel: &Cancel,
        archive: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
    ) -> Result<String, DockerEngineError> {
        let options = query::ImportImageOptions { quiet: true, ..query::ImportImageOptions::default() };
        self.send("load", cancel, archive, async |client, allowance, body| {
            let mut said = client.import_image_stream(options, body.into_stream(), None);
            let mut words = String::new();
            while let Some(line) = said.next().await {
                allowance.restart();
                let line = line.map_err(|error| self.told("load", error))?;
                words.push_str(&line.stream.unwrap_or_default());
            }
            Ok(words.trim().to_owned())
        })
    }

    /// Reads an image as the archive that `docker save` writes.
    pub fn save<T: Send>(
        &self,
        image: &str,
        cancel: &Cancel,
        read: impl FnOnce(&mut dyn Read) -> T + Send,
    ) -> Result<T, DockerEngineError> {
        let (sender, receiver) = mpsc::channel::<Result<Bytes, String>>(WAITING);
        let (saved, read) = std::thread::scope(|scope| {
            let reader = scope.spawn(move || read(&mut Archive { receiver, piece: Bytes::new() }));
            let saved = self.work("save", cancel, async move |client, allowance| {
                let mut archive = std::pin::pin!(client.export_image(image));
                while let Some(piece) = archive.next().await {
                    allowance.restart();
                    let piece = piece.map_err(|error| self.told("save", error));
                    let told = piece.clone().map_err(|error| error.to_string());
                    if sender.send(told).await.is_err() {
                        // Who reads knows enough.
                        break;
                    }
                    piece?;
                }
                Ok(())
            });
            (saved, reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        saved.map(|()| read)
    }

    /// Id of an image that is named or known by its first digits.
    pub fn image_id(&self, name: &str) -> Result<Digest, DockerEngineError> {
        let said = self.inspect_image(name)?;
        let id = said["Id"].as_str().unwrap_or_default();
        id.parse().map_err(|_| DockerEngineError::Broken {
            endpoint: self.to_string(),
            call: "image inspection".into(),
            reason: format!("it gave the id {id:?}"),
        })
    }
}

/// The repository as an engine's query takes it.
pub(super) fn repository(name: &Reference) -> String {
    match name.registry() {
        "docker.io" => name.repository().strip_prefix("library/").unwrap_or(name.repository()).to_owned(),
        registry => format!("{registry}/{}", name.repository()),
    }
}

/// An archive as it arrives.
struct Archive {
    receiver: mpsc::Receiver<Result<Bytes, String>>,
    piece: Bytes,
}

impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.receiver.blocking_recv() {
                Some(Ok(piece)) => self.piece = piece,
                Some(Err(reason)) => return Err(io::Error::other(reason)),
                None => return Ok(0),
            }
        }
        let taken = self.piece.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&self.piece.split_to(taken));
        Ok(taken)
    }
}
