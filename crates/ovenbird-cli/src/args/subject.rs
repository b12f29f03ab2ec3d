//! What a command is about: a Dockerfile with its context, and what both are read with.

use std::collections::BTreeMap;

use clap::{Args, ValueHint};
use ovenbird::project::Project;
use ovenbird::request::{ContextSource, DockerfileFrom, Source};
use ovenbird::{BuildRequest, Environment, Error, Kind};
use ovenbird_oci::Platform;

#[derive(Debug, Args)]
pub(crate) struct Subject {
    /// Build context: a folder; a git repository (`URL#REF:FOLDER`); the URL of a tar archive (plain, gzip, bzip2, xz, zstd) or of a Dockerfile;
    /// `oci://IMAGE` or `oci-layout://PATH`; `-` for an archive or a Dockerfile on standard input [default: `.`]. For `build`, where there is an
    /// ovenbird.toml, also names of its images [default: all]
    #[arg(value_name = "PATH|URL", value_hint = ValueHint::AnyPath)]
    pub(crate) words: Vec<String>,
    /// Dockerfile, seen from the working directory, or inside a context that is fetched [default: Dockerfile in the context]; `-` for standard input
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: Option<String>,
    /// Value of an ARG; a NAME alone takes its value from the environment, and is left out when it is not set there
    #[arg(long = "build-arg", value_name = "NAME[=VALUE]")]
    variables: Vec<String>,
    /// Stage to build [default: the last]
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Platform, for example linux/arm64; several make an index [env: DOCKER_DEFAULT_PLATFORM]
    #[arg(long = "platform", value_name = "OS/ARCH[/VARIANT]", value_delimiter = ',', value_parser = platform)]
    platforms: Vec<Platform>,
    /// One more context that the Dockerfile can name: a folder, a URL as above, docker-image://NAME, oci-layout://PATH (both images) or target:STAGE
    #[arg(long = "build-context", value_name = "NAME=VALUE")]
    contexts: Vec<String>,
}

impl Subject {
    /// Where the Dockerfile is.
    pub(crate) fn dockerfile(&self) -> DockerfileFrom {
        match self.file.as_deref() {
            None | Some("") => DockerfileFrom::Default,
            Some("-") => DockerfileFrom::Stdin,
            Some(path) => DockerfileFrom::Path(path.into()),
        }
    }

    /// The one build context.
    pub(crate) fn context(&self) -> Result<&str, Error> {
        match self.words.as_slice() {
            [] => Ok("."),
            [one] => Ok(one),
            [first, ..] => {
                let told = format!("there are {} build contexts, {first:?} and others: one build has one", self.words.len());
                Err(Error::new(Kind::Usage, told).hint("several words are names of images in ovenbird.toml, which is not here"))
            }
        }
    }

    /// The images of the project in this folder that the words name: all for no words, `None` when they name a context.
    pub(crate) fn images(&self, environment: &Environment) -> Result<Option<(Project, Vec<String>)>, Error> {
        let folder = environment.working_directory();
        if !Project::is_at(folder) || (self.words.is_empty() && self.file.is_some()) {
            return Ok(None);
        }
        // What has a slash or begins with a dot is a place.
        let is_place =
            |word: &String| matches!(word.as_str(), "" | "-") || word.starts_with('.') || word.contains('/') || word.contains(':');
        if self.words.len() == 1 && is_place(&self.words[0]) {
            return Ok(None);
        }
        let Some(project) = Project::find(folder)? else { return Ok(None) };
        if let [word] = self.words.as_slice() {
            let is_folder = folder.join(word).is_dir();
            match project.has(word) {
                // Its own folder: that is what the image is built from.
                true if is_folder && !project.is_of_folder(word) => {
                    return Err(Error::new(Kind::Usage, format!("{word:?} is a folder, and an image of ovenbird.toml"))
                        .hint(format!("write ./{word} for the folder, or --image {word} for the image")));
                }
                false if is_folder => return Ok(None),
                true | false => {}
            }
        }
        let names = if self.words.is_empty() { project.names().map(str::to_owned).collect() } else { self.words.clone() };
        Ok(Some((project, names)))
    }

    /// A request for what is said elsewhere.
    pub(crate) fn request_of_project(&self, environment: &Environment) -> Result<BuildRequest, Error> {
        self.request_for(Source::Path(".".into()), self.dockerfile(), environment)
    }

    /// Flags that are about one image.
    pub(crate) fn of_one_image(&self) -> Vec<&'static str> {
        let flags = [("--file", self.file.is_some()), ("--target", self.target.is_some()), ("--build-context", !self.contexts.is_empty())];
        flags.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag).collect()
    }

    /// A request that says this and no more.
    pub(crate) fn request(&self, environment: &Environment) -> Result<BuildRequest, Error> {
        let source = self.context()?.parse().map_err(|e| Error::new(Kind::Usage, format!("the build context: {e}")))?;
        self.request_for(source, self.dockerfile(), environment)
    }

    /// As [`request`](Self::request), for another context and Dockerfile.
    pub(crate) fn request_for(&self, source: Source, dockerfile: DockerfileFrom, environment: &Environment) -> Result<BuildRequest, Error> {
        let mut platforms = self.platforms.clone();
        if let Some(default) = environment.get("DOCKER_DEFAULT_PLATFORM").filter(|default| platforms.is_empty() && !default.is_empty()) {
            platforms.push(platform(default).map_err(|reason| Error::new(Kind::Usage, format!("DOCKER_DEFAULT_PLATFORM: {reason}")))?);
        }
        Ok(BuildRequest {
            dockerfile,
            contexts: build_contexts(&self.contexts)?,
            target: self.target.clone().filter(|t| !t.is_empty()),
            build_args: build_args(&self.variables, environment)?,
            platforms,
            ..BuildRequest::new(source)
        })
    }
}

pub(crate) fn platform(text: &str) -> Result<Platform, String> {
    if text == "local" { Ok(Platform::host()) } else { text.parse().map_err(|e: ovenbird_oci::platform::ParsePlatformError| e.to_string()) }
}

/// `--build-context`.
fn build_contexts(rows: &[String]) -> Result<BTreeMap<String, ContextSource>, Error> {
    let mut contexts = BTreeMap::new();
    for row in rows {
        let Some((name, value)) = row.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            return Err(Error::new(Kind::Usage, format!("--build-context {row:?}: expected NAME=VALUE")));
        };
        if name == "context" {
            return Err(Error::new(Kind::Usage, "--build-context: the name `context` is the main context").hint("give it as PATH"));
        }
        let value = value.parse::<ContextSource>().map_err(|e| Error::new(Kind::Usage, format!("--build-context: {e}")))?;
        contexts.insert(name.to_owned(), value);
    }
    Ok(contexts)
}

/// `--build-arg`; the last of a name wins.
fn build_args(rows: &[String], environment: &Environment) -> Result<BTreeMap<String, String>, Error> {
    let mut build_args = BTreeMap::new();
    for row in rows {
        match row.split_once('=') {
            Some(("", _)) => return Err(Error::new(Kind::Usage, format!("--build-arg {row:?} has no name"))),
            Some((name, value)) => drop(build_args.insert(name.to_owned(), value.to_owned())),
            None => match environment.get(row) {
                Some(value) => drop(build_args.insert(row.clone(), value.to_owned())),
                None => drop(build_args.remove(row)),
            },
        }
    }
    Ok(build_args)
}
