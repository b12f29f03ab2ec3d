//! One image under several names, in several registries: under all of them, or under none.
//!
//! Everything goes to every registry under its digest first, where nobody who asks for a name sees it. Then each registry is asked
//! what the names mean now, and the names are put, class by class. When one is refused, those that were put are taken back.
//! Invariant: once a name was put, nothing stops this but its end: neither a failure nor the user.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::endpoint::Endpoint;
use super::push::Repository;
use super::tree::Tree;
use super::{Fetched, Inner, Publication, RegistryError, all};
use crate::Digest;
use crate::publish::{TagClass, Target};

/// Names that are asked about or put at once.
const AT_ONCE: usize = 8;
/// Between two attempts to take a name back.
const UNDO_PAUSE: Duration = Duration::from_millis(500);
/// How often it is looked whether the user stops a publish.
const STOP_POLL: Duration = Duration::from_millis(20);

/// A name, and what it was before.
struct Name {
    repository: Arc<Repository>,
    tag: String,
    class: TagClass,
    target: Digest,
    before: Before,
    undo: Duration,
}

/// What a name meant before.
enum Before {
    /// Nothing.
    Absent,
    /// This.
    Was(Box<Fetched>),
    /// The registry cannot read it: it died while it wrote, or its storage is damaged. To put the name mends that.
    Unreadable,
}

/// What became of a name that was put.
struct Put {
    name: Arc<Name>,
    /// Whether it may be there.
    taken: bool,
    result: Result<(), RegistryError>,
}

/// What became of a name that was taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Undone {
    /// It was new.
    Removed,
    /// It means what it meant before.
    Restored,
    /// It had not been taken, or somebody else moved it in between.
    Untouched,
}

/// Publishes; see [`super::Client::publish`].
pub(super) async fn publish(inner: &Arc<Inner>, publication: &Publication<'_>, stop: &Arc<AtomicBool>) -> Result<(), RegistryError> {
    let action = match publication.to {
        [only] => format!("push {}", only.reference),
        several => format!("publish {} names", several.len()),
    };
    let cancelled = || RegistryError::Cancelled { action: action.clone() };
    let ready = async {
        let names = prepare(inner, publication, &action).await?;
        ask(names).await
    };
    let mut names = tokio::select! {
        names = ready => names.map_err(|error| unchanged(error, publication))?,
        () = stopped(stop) => return Err(cancelled()),
    };
    names.sort_by_key(|name| name.class);
    let mut put = vec![];
    for class in names.chunk_by(|a, b| a.class == b.class) {
        if stop.load(Ordering::SeqCst) {
            return Err(take_back(cancelled(), vec![], put).await);
        }
        let mut failed = None;
        for done in at_once(class.iter().map(Arc::clone), |name| put_name(name, Arc::clone(stop))).await {
            match done.result {
                Ok(()) => put.push(done.name),
                Err(error) => {
                    if done.taken {
                        put.push(done.name);
                    }
                    failed.get_or_insert_with(Vec::new).push(error);
                }
            }
        }
        if failed.is_some() && stop.load(Ordering::SeqCst) {
            return Err(take_back(cancelled(), vec![], put).await);
        }
        if let Some(mut failed) = failed {
            let first = failed.remove(0);
            return Err(take_back(first, failed, put).await);
        }
    }
    Ok(())
}

async fn stopped(stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        tokio::time::sleep(STOP_POLL).await;
    }
}

/// Brings everything to every repository, and gives the names to put.
async fn prepare(inner: &Arc<Inner>, publication: &Publication<'_>, action: &str) -> Result<Vec<Name>, RegistryError> {
    let target = publication.image.digest;
    for reference in publication.to.iter().map(|to| &to.reference) {
        if let Some(digest) = reference.digest().filter(|digest| **digest != target) {
            return Err(RegistryError::Corrupt {
                what: format!("push {reference}"),
                expected: digest.to_string(),
                actual: target.to_string(),
            });
        }
    }
    let tree = Tree::read(inner, publication.store, publication.image, publication.origins, action).await?;
    let tree = Arc::new(tree);
    // In the order of the names; the repositories of one registry together.
    let mut registries: Vec<Vec<Arc<Repository>>> = vec![];
    let mut names: Vec<Name> = vec![];
    for Target { reference, class } in publication.to {
        let registry = match registries.iter().position(|r| r.first().is_some_and(|r| r.to.registry() == reference.registry())) {
            Some(at) => &mut registries[at],
            None => {
                registries.push(vec![]);
                let last = registries.len() - 1;
                &mut registries[last]
            }
        };
        let repository = match registry.iter().find(|r| r.to.repository() == reference.repository()) {
            Some(repository) => Arc::clone(repository),
            None => {
                let repository = Arc::new(Repository {
                    inner: Arc::clone(inner),
                    store: publication.store.clone(),
                    endpoint: Endpoint::of(reference.registry(), &inner.options)?,
                    to: reference.clone(),
                    tree: Arc::clone(&tree),
                    progress: Arc::clone(publication.progress),
                    head_starts: Arc::clone(publication.head_starts),
                });
                registry.push(Arc::clone(&repository));
                repository
            }
        };
        let Some(tag) = reference.tag() else { continue };
        match names.iter_mut().find(|name| Arc::ptr_eq(&name.repository, &repository) && name.tag == tag) {
            // Said twice: the later moment counts.
            Some(name) => name.class = name.class.max(*class),
            None => {
                let (tag, undo) = (tag.to_owned(), inner.options.timeouts.undo);
                names.push(Name { repository, tag, class: *class, target, before: Before::Absent, undo });
            }
        }
    }
    let mut tasks = JoinSet::new();
    for repositories in registries {
        tasks.spawn(async move {
            let mut first = None;
            for repository in &repositories {
                repository.fill(first).await?;
                first.get_or_insert(&repository.to);
            }
            Ok(())
        });
    }
    all(tasks, action).await?;
    Ok(names)
}

/// Asks what each name means now, and gives the names that mean something else. A registry that does not answer now would not take the
/// names, nor could they be taken back.
async fn ask(names: Vec<Name>) -> Result<Vec<Arc<Name>>, RegistryError> {
    let asked = at_once(names, |mut name: Name| async move {
        name.before = match name.repository.document(&name.tag).await {
            Ok(found) => found.map_or(Before::Absent, |found| Before::Was(Box::new(found))),
            Err(RegistryError::Server { .. } | RegistryError::Protocol { .. } | RegistryError::TooLarge { .. }) => Before::Unreadable,
            Err(error) => return Err(error),
        };
        Ok(name)
    });
    let mut changing = vec![];
    for name in asked.await {
        let name: Name = name?;
        if !matches!(&name.before, Before::Was(before) if before.descriptor.digest == name.target) {
            changing.push(Arc::new(name));
        }
    }
    Ok(changing)
}

/// Puts a name and looks whether it is there. A registry that takes its time is not waited for when the user stops it.
async fn put_name(name: Arc<Name>, stop: Arc<AtomicBool>) -> Put {
    let action = format!("put the tag {}", name.repository.name(&name.tag));
    tokio::select! {
        put = put_and_look(Arc::clone(&name)) => put,
        () = stopped(&stop) => Put { name, taken: true, result: Err(RegistryError::Cancelled { action }) },
    }
}

async fn put_and_look(name: Arc<Name>) -> Put {
    let manifest = name.repository.tree.manifests.last();
    let put = match manifest {
        Some(manifest) => name.repository.put_manifest(&name.tag, manifest).await,
        None => Ok(()),
    };
    if let Err(error) = put {
        // Whoever did not answer may have done it.
        return Put { taken: error.is_transient() || matches!(error, RegistryError::Corrupt { .. }), result: Err(error), name };
    }
    let result = name.repository.read_back(&name.tag, &name.target).await;
    Put { name, taken: true, result }
}

/// Who publishes several names wants to know what became of the others. What is wrong here is said as it is, to be mended.
fn unchanged(error: RegistryError, publication: &Publication<'_>) -> RegistryError {
    let own = matches!(error, RegistryError::Store { .. } | RegistryError::Cancelled { .. });
    if own || publication.to.len() < 2 {
        return error;
    }
    RegistryError::Unpublished { source: Box::new(error), more: vec![], undone: vec![], left: vec![] }
}

/// Takes names back, and says in the error what came of it.
///
/// One after the other in each repository, and those that are put again first: Docker's registry reads every tag to find those of a manifest
/// that it removes, and stops half-way at one that is being written.
async fn take_back(error: RegistryError, more: Vec<RegistryError>, put: Vec<Arc<Name>>) -> RegistryError {
    let (mut undone, mut left) = (vec![], vec![]);
    let mut repositories: Vec<Vec<Arc<Name>>> = vec![];
    for name in put {
        match repositories.iter_mut().find(|names| Arc::ptr_eq(&names[0].repository, &name.repository)) {
            Some(names) => names.push(name),
            None => repositories.push(vec![name]),
        }
    }
    let taken = at_once(repositories, |mut names| async move {
        names.sort_by_key(|name| matches!(name.before, Before::Absent));
        let end = Instant::now() + names.first().map_or(Duration::ZERO, |name| name.undo);
        let mut taken = vec![];
        for name in names {
            let result = name.take_back(end).await;
            taken.push((name, result));
        }
        taken
    });
    for (name, result) in taken.await.into_iter().flatten() {
        let said = name.repository.name(&name.tag);
        match result {
            Ok(Undone::Removed) => undone.push(format!("{said} was removed again")),
            Ok(Undone::Restored) => undone.push(format!("{said} is what it was before")),
            Ok(Undone::Untouched) => {}
            Err(error) => left.push((said.to_string(), error)),
        }
    }
    if more.is_empty() && undone.is_empty() && left.is_empty() {
        return error;
    }
    RegistryError::Unpublished { source: Box::new(error), more, undone, left }
}

impl Name {
    /// As it was before; tried again until `end` when the registry cannot be reached.
    async fn take_back(&self, end: Instant) -> Result<Undone, RegistryError> {
        let throwaway = self.repository.tree.throwaway();
        let ours = [Some(self.target), throwaway.as_ref().map(|t| t.descriptor.digest)];
        let (mut last, tried) = (None, AtomicBool::new(false));
        loop {
            let attempt = async {
                let now = match self.repository.points_at(&self.tag).await {
                    // It died while it wrote the name, and cannot read it since.
                    Err(RegistryError::Server { .. }) => Some(self.target),
                    now => now?,
                };
                if now.is_none() || !ours.contains(&now) {
                    // What somebody else put in between is theirs.
                    return Ok(match (tried.load(Ordering::Relaxed), &self.before) {
                        (false, _) => Undone::Untouched,
                        (true, Before::Was(_)) => Undone::Restored,
                        (true, _) => Undone::Removed,
                    });
                }
                tried.store(true, Ordering::Relaxed);
                match (&self.before, &throwaway) {
                    (Before::Was(before), _) => {
                        self.repository.put_manifest(&self.tag, before).await?;
                        self.repository.read_back(&self.tag, &before.descriptor.digest).await?;
                        Ok(Undone::Restored)
                    }
                    (Before::Absent, Some(throwaway)) => {
                        self.repository.remove_tag(&self.tag, throwaway).await?;
                        Ok(Undone::Removed)
                    }
                    (Before::Unreadable, _) => Err(RegistryError::Protocol {
                        action: format!("take back {}", self.repository.name(&self.tag)),
                        registry: self.repository.endpoint.registry.clone(),
                        reason: "it could not read what the name meant before".into(),
                    }),
                    (Before::Absent, None) => Err(RegistryError::Unsupported {
                        reference: self.repository.name(&self.tag).to_string(),
                        media_type: "an index without any image".into(),
                    }),
                }
            };
            match tokio::time::timeout_at(end, attempt).await {
                Ok(Err(error)) if error.is_transient() && Instant::now() + UNDO_PAUSE < end => last = Some(error),
                Ok(done) => return done,
                Err(_) => {
                    let silent = || RegistryError::Silent {
                        action: format!("take back {}", self.repository.name(&self.tag)),
                        registry: self.repository.endpoint.registry.clone(),
                        limit: self.undo,
                    };
                    return Err(last.unwrap_or_else(silent));
                }
            }
            tokio::time::sleep(UNDO_PAUSE).await;
        }
    }
}

/// Does the work for every item, some at a time, to its end; the results in the order of the items.
async fn at_once<T, R, F>(items: impl IntoIterator<Item = T>, work: impl Fn(T) -> F) -> Vec<R>
where
    F: Future<Output = R> + Send + 'static,
    R: Send + 'static,
{
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    for (index, item) in items.into_iter().enumerate() {
        let (slots, work) = (Arc::clone(&slots), work(item));
        tasks.spawn(async move {
            // It is never closed.
            let _slot = slots.acquire().await;
            (index, work.await)
        });
    }
    let mut done: Vec<(usize, R)> = tasks.join_all().await;
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}
