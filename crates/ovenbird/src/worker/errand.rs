//! A build whose worker has no caller that could send it anything: the source is an address, credentials of registries are the worker's own,
//! and secrets are what the program that started the worker answers.
//!
//! Whoever may start such a build is not whoever set up the worker's machine: nothing of that machine (a file, a socket, a program) may be
//! named in the request.

use std::io;
use std::sync::Arc;

use ovenbird_engine::Cancel;

use super::question::{Questions, refused};
use super::wire::{Asked, CallerSide, Errand, Sender};
use super::{Place, Wire, in_memory, run};
use crate::builder::Job;
use crate::driver::{Given, check};
use crate::error::{Error, Kind};
use crate::naming::Naming;
use crate::report::BuildReport;
use crate::request::{BuildRequest, CacheDest, CacheFrom, ContextSource, DockerfileFrom, OutputKind, RemoteUrl, SecretOrigin, Source};
use crate::source::Fetcher;
use crate::workflow::Bench;

/// Does this address lead to a server, and has nothing in it that is a secret?
pub(crate) fn is_public(url: &RemoteUrl) -> bool {
    let text = url.expose().to_ascii_lowercase();
    // What comes as JSON was not looked at before. What is shown is the address without what may be a password.
    RemoteUrl::parse(url.expose()).is_some()
        && !text.starts_with("file:")
        && !text.starts_with("oci-layout:")
        && url.split_credentials().0.is_none()
        && url.to_string() == url.expose()
}

/// Refuses, by name, what a build that runs `place` cannot have, but for its source.
pub(crate) fn refuse(request: &BuildRequest, place: &str) -> Result<(), Error> {
    let no = |option: String, hint: String| Err(Error::refused(&option, format!("the build runs {place}")).hint(hint));
    if !request.ssh.is_empty() {
        return no("--ssh".into(), "give the worker there an ssh key of its own, or build with --on here".into());
    }
    if !request.workflow.is_empty() {
        return no("a plugin".into(), "plugins, their programs and their secrets are on this machine; build with --on here".into());
    }
    if request.cache_from.iter().any(|from| matches!(from, CacheFrom::Local { .. })) {
        return no("--cache-from type=local".into(), "use type=registry".into());
    }
    if request.cache_to.iter().any(|to| matches!(to.dest, CacheDest::Local { .. })) {
        return no("--cache-to type=local".into(), "use type=registry".into());
    }
    for (name, context) in &request.contexts {
        if matches!(context, ContextSource::Image(image) if image.starts_with("oci-layout://")) {
            return no(format!("--build-context {name}=oci-layout://"), "push the image to a registry and use docker-image://".into());
        }
    }
    for secret in &request.secrets {
        if secret.origin != SecretOrigin::ById {
            return no(
                format!("--secret id={} with src= or env=", secret.id),
                format!(
                    "its bytes would have to go through a server; keep it there (a Secret block ovenbird-{0}, or the worker's variable OVENBIRD_SECRET_…) and ask for it with --secret id={0}",
                    secret.id
                ),
            );
        }
    }
    for output in &request.outputs {
        let name = match output.kind {
            OutputKind::Image | OutputKind::Registry | OutputKind::CacheOnly => continue,
            OutputKind::Load => "--load",
            OutputKind::OciTar(_) | OutputKind::OciDir(_) => "-o type=oci",
            OutputKind::DockerTar(_) => "-o type=docker",
            OutputKind::Local(_) => "-o type=local",
            OutputKind::Tar(_) => "-o type=tar",
        };
        return no(name.into(), "use --push, and then `ovenbird pull` and `ovenbird export` here".into());
    }
    Ok(())
}

/// Refuses sources that are on the worker's machine.
fn refuse_places(request: &BuildRequest) -> Result<(), Error> {
    let no = |what: String| {
        Err(Error::refused(&what, "the worker has no files of the caller; give an address of git, of a web server or oci://NAME"))
    };
    match &request.source {
        Source::Remote(url) if is_public(url) => {}
        Source::Remote(url) => return no(format!("the source {url}")),
        Source::Path(_) | Source::Stdin => return no("a source that is a folder or standard input".into()),
    }
    if request.dockerfile == DockerfileFrom::Stdin {
        return no("a Dockerfile on standard input".into());
    }
    for (name, context) in &request.contexts {
        match context {
            ContextSource::Remote(url) if !is_public(url) => return no(format!("the build context {name}={url}")),
            ContextSource::Path(_) => return no(format!("the build context {name}, a folder")),
            ContextSource::Remote(_) | ContextSource::Image(_) | ContextSource::Target(_) => {}
        }
    }
    Ok(())
}

pub(super) fn build(
    place: &Place,
    errand: Errand,
    to: &Arc<Sender>,
    questions: &Arc<Questions>,
    cancel: &Cancel,
) -> Result<BuildReport, Error> {
    let Errand { mut request, caller } = errand;
    // Who waits has said names in full.
    if caller.is_none() {
        request = place.settings.with_full_names(request);
    }
    refuse(&request, "where no caller is")?;
    refuse_places(&request)?;
    let (values, policies, now, origin) = match caller {
        Some(CallerSide { values, policies, now, origin }) => (values, policies, now, origin),
        None => (None, place.settings.tags.clone(), place.environment.now(), None),
    };
    let mut naming = Naming::new(&request, &policies)?;
    check(&naming.probe(&request)?.request)?;
    // Files in memory live as long as these.
    let mut held = vec![];
    for spec in &mut request.secrets {
        let what = format!("secret {:?}", spec.id);
        let bytes = questions.bytes(Asked::Secret { id: spec.id.clone() }).map_err(|reason| refused(&what, reason))?;
        let kept = in_memory(&bytes);
        let (fd, path) = kept.map_err(|error| Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot hold {what}")))?;
        held.push(fd);
        spec.origin = SecretOrigin::File(path);
    }
    let job = Job { sink: Arc::new(Wire(Arc::clone(to), place.echo.clone())), cancel: cancel.clone() };
    let mut tree = Fetcher::new(&place.settings, &place.environment).fetch(&request, &mut io::empty(), &job)?;
    if origin.is_some() {
        tree.origin = origin;
    }
    let request = tree.dated(&request);
    let values = values.unwrap_or_else(|| {
        naming.look_around(&request, tree.revision.as_ref(), now);
        naming.values().clone()
    });
    // Plugins are refused: nothing of it is ever asked.
    let bench = Bench { policies, now, ..Bench::new(&place.settings, &place.environment) };
    run(place, bench, Given { tree, values }, &request, &job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused() {
        let told = |change: &dyn Fn(&mut BuildRequest)| {
            let mut request = BuildRequest::new(Source::Remote(RemoteUrl::parse("https://git.test/a.git").unwrap()));
            change(&mut request);
            refuse(&request, "there")
                .and_then(|()| refuse_places(&request))
                .err()
                .map_or_else(|| "good".to_owned(), |error| error.to_string())
        };
        let remote = |text: &str| RemoteUrl::parse(text).unwrap();
        assert_eq!(told(&|_| {}), "good");
        assert_eq!(told(&|r| r.secrets = vec!["id=token".parse().unwrap()]), "good");
        assert_eq!(told(&|r| r.outputs = vec!["type=registry".parse().unwrap()]), "good");
        assert_eq!(told(&|r| r.source = Source::Remote(remote("git@git.test:a/b"))), "good");
        assert_eq!(told(&|r| r.source = Source::Remote(remote("oci://r.test/a@sha256:ab"))), "good");
        type Change<'a> = &'a dyn Fn(&mut BuildRequest);
        let rows: [(Change<'_>, &str); 15] = [
            (&|r| r.source = Source::Path("/etc".into()), "a source that is a folder"),
            (&|r| r.source = Source::Stdin, "a source that is a folder or standard input"),
            (&|r| r.source = Source::Remote(remote("file:///srv/secret.git")), "the source file:///srv/secret.git"),
            (&|r| r.source = Source::Remote(remote("FILE:///srv/secret.git")), "the source FILE:///srv/secret.git"),
            (&|r| r.source = Source::Remote(remote("oci-layout:///srv/layout")), "the source oci-layout:///srv/layout"),
            (&|r| r.source = Source::Remote(remote("https://me:TOK@git.test/a.git")), "the source https://***@git.test/a.git"),
            (&|r| r.source = Source::Remote(remote("https://h.test/a.tar?token=TOK")), "the source https://h.test/a.tar?token=***"),
            (&|r| r.dockerfile = DockerfileFrom::Stdin, "a Dockerfile on standard input"),
            (&|r| drop(r.contexts.insert("n".into(), ContextSource::Path("/etc".into()))), "the build context n, a folder"),
            (&|r| drop(r.contexts.insert("n".into(), ContextSource::Image("oci-layout:///x".into()))), "--build-context n=oci-layout://"),
            (&|r| r.ssh = vec!["default".parse().unwrap()], "--ssh"),
            (&|r| r.secrets = vec!["id=token,src=/etc/shadow".parse().unwrap()], "--secret id=token with src= or env="),
            (&|r| r.secrets = vec!["id=token,env=TOKEN".parse().unwrap()], "--secret id=token with src= or env="),
            (&|r| r.outputs = vec!["type=local,dest=/etc".parse().unwrap()], "-o type=local"),
            (&|r| r.cache_from = vec!["type=local,src=/etc".parse().unwrap()], "--cache-from type=local"),
        ];
        for (change, expect) in rows {
            let got = told(change);
            assert!(got.starts_with(expect) && got.contains("is not supported") && !got.contains("TOK"), "{expect}: {got}");
        }
    }
}
