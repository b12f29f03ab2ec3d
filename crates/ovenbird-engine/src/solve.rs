//! Runs a plan: asks for the target, and does only what the answer needs.
//!
//! First every vertex gets its definition key (see [`crate::cache`]). Then the target is asked for:
//! a vertex whose key leads to a result is done, without its inputs ever being looked at; the others
//! wait for their inputs, try the content key, and run, as many at once as [`crate::schedule`] has threads.

mod explain;
pub mod identity;
mod local;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use ovenbird_oci::Digest;
use ovenbird_oci::layer::LayerError;

use crate::cache::{self, CacheKey, Chain, Filed, Link, Record};
use crate::error::BuildError;
use crate::event::Event;
use crate::export::assemble;
use crate::export::leak::Gate;
use crate::ops::exec::StepName;
use crate::ops::file::{FileError, Lent};
use crate::ops::mount::shared_caches;
use crate::ops::{Session, content, exec, file, image, remote};
use crate::plan::{CopyAction, ExecMountKind, FileAction, FileOp, Op, Plan, VertexId};
use crate::schedule;
use crate::snapshot::tree::Tree;
use crate::snapshot::view::View;
use crate::trace::{Before, Outcome, Trace};

use local::Reads;

/// Remote sources fetched at once.
const MOST_DOWNLOADS: usize = 8;

/// The error is in [`Solver::failure`]; the first one counts.
#[derive(Debug, Clone, Copy)]
struct Failed;

#[derive(Debug, Default)]
struct Node {
    definition: OnceLock<CacheKey>,
    /// Keys of the inputs that the definition key was made of.
    inputs: OnceLock<Vec<Option<CacheKey>>>,
    /// What was seen of local folders, by [`files_of`].
    contents: Mutex<BTreeMap<String, content::Contents>>,
    outcome: OnceLock<Outcome>,
    causes: OnceLock<Vec<String>>,
    hit: OnceLock<Option<Record>>,
    solved: OnceLock<Arc<Record>>,
    announced: AtomicBool,
}

/// From so many bytes on it is better to pack a layer from where its files are: smaller ones are soon copied, and then the next step has them.
const WORTH_LENDING: u64 = 64 << 20;

/// Vertices whose files are only added to an image: nothing that runs or copies looks at them.
fn unread(plan: &Plan) -> Vec<bool> {
    let mut unread = vec![true; plan.vertices.len()];
    // Inputs have lower numbers, so those who read are known before what they read.
    for (id, vertex) in plan.vertices.iter().enumerate().rev() {
        let reads = !matches!(vertex.op, Op::Merge { .. }) || !unread[id];
        for input in vertex.op.inputs() {
            unread[input] &= !reads;
        }
    }
    unread
}

/// One plan being run.
struct Solver<'a> {
    session: &'a Session<'a>,
    plan: &'a Plan,
    gate: Option<&'a Gate>,
    /// Steps whose files nothing of the plan reads.
    unread: Vec<bool>,
    /// Added to vertex ids in events, so that plans of several platforms do not collide.
    offset: usize,
    nodes: Vec<Node>,
    /// The vertex or something it reads was asked to run again: its definition key must not be looked up.
    stale: Vec<bool>,
    /// As `stale`, but copied content does not count: it is compared by content.
    fresh: Vec<bool>,
    /// The last build of the same Dockerfile, read when something runs.
    before: OnceLock<Before>,
    failure: Mutex<Option<BuildError>>,
}

/// What a plan came to.
#[derive(Debug, Default)]
pub struct Solved {
    /// The target's root file system.
    pub chain: Chain,
    /// Results of all steps that lead to it, when they are wanted by other machines.
    pub filed: Vec<Filed>,
    /// Folders of the cache mounts of those steps.
    pub mounts: BTreeSet<Digest>,
}

/// Runs a plan.
///
/// Layers that nothing reads are packed at once; `gate` searches them.
pub fn solve(session: &Session, gate: &Gate, plan: &Plan, offset: usize) -> Result<Solved, BuildError> {
    let Some(root) = plan.root else { return Ok(Solved::default()) };
    let solver = Solver { gate: Some(gate), ..Solver::new(session, plan, offset) };
    let outcome = solver.prepare().and_then(|()| {
        let outcome = solver.solve(root);
        // Without all keys the trace would explain less than that of the build before.
        solver.remember();
        outcome
    });
    match outcome {
        Ok(record) => {
            let (filed, mounts) = solver.filed(root);
            Ok(Solved { chain: record.chain.clone(), filed, mounts })
        }
        Err(Failed) => Err(solver.into_failure()),
    }
}

/// What [`solve`] would do, without running any step. Remote sources are fetched: without them nothing is known.
pub fn foresee(session: &Session, plan: &Plan) -> Result<Trace, BuildError> {
    let solver = Solver::new(session, plan, 0);
    if let Some(root) = plan.root {
        if solver.prepare().is_err() {
            return Err(solver.into_failure());
        }
        for vertex in solver.needed(root).into_keys().filter(|vertex| solver.is_step(*vertex)) {
            let node = &solver.nodes[vertex];
            if solver.hit(vertex).is_some() {
                let _ = node.outcome.set(Outcome::Cached);
            } else {
                let _ = node.outcome.set(Outcome::WouldRun);
                let _ = node.causes.set(solver.causes(vertex));
            }
        }
    }
    Ok(solver.trace())
}

impl<'a> Solver<'a> {
    fn new(session: &'a Session<'a>, plan: &'a Plan, offset: usize) -> Self {
        let mut solver = Self {
            session,
            plan,
            gate: None,
            unread: unread(plan),
            offset,
            nodes: plan.vertices.iter().map(|_| Node::default()).collect(),
            stale: vec![],
            fresh: vec![],
            before: OnceLock::new(),
            failure: Mutex::new(None),
        };
        solver.mark_no_cache();
        solver
    }

    fn into_failure(self) -> BuildError {
        self.failure.into_inner().unwrap_or_else(PoisonError::into_inner).unwrap_or(BuildError::Cancelled)
    }

    fn op(&self, vertex: VertexId) -> &'a Op {
        &self.plan.vertices[vertex].op
    }

    fn step(&self, vertex: VertexId) -> StepName {
        let v = &self.plan.vertices[vertex];
        StepName { index: self.offset + vertex, name: v.name.clone(), lines: v.lines }
    }

    fn fail(&self, error: BuildError) -> Failed {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.session.stop.store(true, Ordering::SeqCst);
        Failed
    }

    fn mark_no_cache(&mut self) {
        for (id, vertex) in self.plan.vertices.iter().enumerate() {
            let inputs = vertex.op.inputs();
            debug_assert!(inputs.iter().all(|input| *input < id));
            let stale = vertex.no_cache || inputs.iter().any(|input| self.stale[*input]);
            let by_identity = match &vertex.op {
                Op::File(file) => file.base.into_iter().collect(),
                _ => inputs,
            };
            let fresh = vertex.no_cache || by_identity.iter().any(|input| self.fresh[*input]);
            self.stale.push(stale);
            self.fresh.push(fresh);
        }
    }

    /// Fetches remote sources and finds every definition key.
    fn prepare(&self) -> Result<(), Failed> {
        let remote = (0..self.plan.vertices.len()).filter(|vertex| matches!(self.op(*vertex), Op::Git(_) | Op::Http(_)));
        schedule::run(&remote.map(|vertex| (vertex, vec![])).collect(), MOST_DOWNLOADS, |vertex| self.fetch(vertex))?;
        for vertex in 0..self.plan.vertices.len() {
            let key = self.definition(vertex)?;
            let _ = self.nodes[vertex].definition.set(key);
        }
        Ok(())
    }

    fn fetch(&self, vertex: VertexId) -> Result<(), Failed> {
        let step = self.step(vertex);
        let began = Instant::now();
        self.announce_start(vertex);
        let fetched = match self.op(vertex) {
            Op::Git(op) => remote::git::fetch(self.session, &step, op),
            Op::Http(op) => remote::http::fetch(self.session, &step, op),
            _ => return Ok(()),
        };
        let record = self.announce_end(vertex, began, fetched.map(Arc::new))?;
        let _ = self.nodes[vertex].solved.set(record);
        Ok(())
    }

    fn definition(&self, vertex: VertexId) -> Result<CacheKey, Failed> {
        let known = |input: VertexId| self.nodes[input].definition.get().copied();
        match self.op(vertex) {
            Op::Image(image) => Ok(CacheKey::of_content(image.manifest)),
            Op::Git(_) | Op::Http(_) => match self.nodes[vertex].solved.get() {
                Some(record) => Ok(record.key),
                _ => Err(Failed),
            },
            // Never used alone: those who read a local folder are keyed by what they read of it.
            Op::Local { name } => Ok(CacheKey::of_content(Digest::of(format!("local {name}").as_bytes()))),
            op => {
                let inputs = self.input_keys(vertex, op, &|input| known(input).ok_or(Failed), false)?;
                let key = CacheKey::of(op, &self.plan.platform, &inputs);
                let _ = self.nodes[vertex].inputs.set(inputs);
                Ok(key)
            }
        }
    }

    /// What the key of a vertex is made of, whose inputs have the keys `of`: first the base's, then in the order of the actions or mounts.
    /// With `content`, copied files count by content instead of by key.
    fn input_keys(
        &self,
        vertex: VertexId,
        op: &Op,
        of: &dyn Fn(VertexId) -> Result<CacheKey, Failed>,
        content: bool,
    ) -> Result<Vec<Option<CacheKey>>, Failed> {
        let optional = |input: Option<VertexId>| input.map(of).transpose();
        let mut inputs = vec![optional(op.base())?];
        match op {
            Op::File(file) => {
                for action in &file.actions {
                    let FileAction::Copy(copy) = action else { continue };
                    let local = matches!(self.op(copy.from), Op::Local { .. });
                    inputs.push(Some(if local || content { self.content_of(vertex, copy)? } else { of(copy.from)? }));
                }
            }
            Op::Exec(exec) => {
                for mount in &exec.mounts {
                    let source = match &mount.kind {
                        ExecMountKind::Bind { source, .. } | ExecMountKind::Cache { source, .. } => source,
                        _ => "",
                    };
                    inputs.push(match mount.kind.from() {
                        Some(from) => match self.op(from) {
                            Op::Local { name } => Some(self.local_key(vertex, &Reads::Mount(name, source))?),
                            _ => Some(of(from)?),
                        },
                        None => None,
                    });
                }
            }
            Op::Merge { layer, .. } => inputs.push(Some(of(*layer)?)),
            _ => {}
        }
        Ok(inputs)
    }

    /// The content key of a vertex whose inputs are solved.
    fn content_key(&self, vertex: VertexId, op: &Op) -> Result<CacheKey, Failed> {
        let solved = |input: VertexId| self.nodes[input].solved.get().map(|record| record.key).ok_or(Failed);
        Ok(CacheKey::of(op, &self.plan.platform, &self.input_keys(vertex, op, &solved, true)?))
    }

    fn tree(&self, vertex: VertexId) -> Result<Arc<dyn Tree>, BuildError> {
        match self.op(vertex) {
            Op::Local { name } => self.context(name),
            _ => {
                let chain = match self.nodes[vertex].solved.get() {
                    Some(record) => record.chain.clone(),
                    _ => return Err(BuildError::Cancelled),
                };
                Ok(Arc::new(View::new(&image::snapshot(self.session, &chain)?)))
            }
        }
    }

    fn context(&self, name: &str) -> Result<Arc<dyn Tree>, BuildError> {
        self.session.contexts.get(name).cloned().ok_or_else(|| BuildError::NotGiven {
            step: "the build".into(),
            line: None,
            what: format!("build context {name}"),
            hint: format!("give it with --build-context {name}=PATH"),
        })
    }

    /// Key of what an action copies.
    fn content_of(&self, vertex: VertexId, copy: &CopyAction) -> Result<CacheKey, Failed> {
        if let Op::Local { name } = self.op(copy.from) {
            return self.local_key(vertex, &Reads::Copy(name, copy));
        }
        let seen = self
            .tree(copy.from)
            .and_then(|tree| content::of_copy(&*tree, copy, &self.session.stat_cache).map_err(|error| self.file_error(vertex, error)));
        seen.map(|contents| CacheKey::of_content(contents.digest)).map_err(|error| self.fail(error))
    }

    fn file_error(&self, vertex: VertexId, source: file::FileError) -> BuildError {
        let step = self.step(vertex);
        BuildError::File { line: step.line(), step: step.name, source }
    }

    /// A result that the definition key leads to.
    fn hit(&self, vertex: VertexId) -> Option<&Record> {
        self.nodes[vertex]
            .hit
            .get_or_init(|| {
                let key = self.nodes[vertex].definition.get()?;
                let cacheable = matches!(self.op(vertex), Op::Exec(_) | Op::File(_)) && !self.stale[vertex];
                cacheable.then(|| self.find(key)).flatten()
            })
            .as_ref()
    }

    fn find(&self, key: &CacheKey) -> Option<Record> {
        self.session.imports.find(self.session, self.plan, key)
    }

    /// Results of the steps that lead to a vertex, in the order of the plan: also of those that this build had no need to look at.
    fn filed(&self, root: VertexId) -> (Vec<Filed>, BTreeSet<Digest>) {
        let wanted = self.session.input.cache_exported || self.session.input.cache_inline;
        if !wanted || !self.session.is_settled() {
            return (vec![], BTreeSet::new());
        }
        let mut reached = vec![false; root + 1];
        reached[root] = true;
        for id in (0..=root).rev() {
            if reached[id] {
                self.op(id).inputs().into_iter().for_each(|input| reached[input] = true);
            }
        }
        let steps = || (0..=root).filter(|id| reached[*id] && self.is_step(*id));
        let mounts = steps().filter_map(|id| if let Op::Exec(exec) = self.op(id) { Some(&exec.mounts[..]) } else { None });
        let mounts = mounts.flat_map(shared_caches).collect();
        let filed = steps().filter_map(|id| {
            let definition = *self.nodes[id].definition.get()?;
            let record = match self.nodes[id].solved.get() {
                Some(solved) => (**solved).clone(),
                None => self.find(&definition)?,
            };
            Some(Filed { definition, record })
        });
        (filed.collect(), mounts)
    }

    fn solve(&self, target: VertexId) -> Result<Arc<Record>, Failed> {
        schedule::run(&self.needed(target), self.session.input.parallelism.max(1), |vertex| {
            let record = self.solve_one(vertex)?;
            let _ = self.nodes[vertex].solved.set(record);
            Ok(())
        })?;
        self.nodes[target].solved.get().cloned().ok_or(Failed)
    }

    /// What must be done for the target: each vertex with the inputs it has to wait for.
    fn needed(&self, target: VertexId) -> BTreeMap<VertexId, Vec<VertexId>> {
        let mut needed = BTreeMap::new();
        let mut open = vec![target];
        while let Some(vertex) = open.pop() {
            if needed.contains_key(&vertex) {
                continue;
            }
            let mut inputs = if self.hit(vertex).is_some() { vec![] } else { self.op(vertex).inputs() };
            inputs.sort_unstable();
            inputs.dedup();
            inputs.retain(|input| !matches!(self.op(*input), Op::Local { .. }) && self.nodes[*input].solved.get().is_none());
            open.extend(&inputs);
            needed.insert(vertex, inputs);
        }
        needed
    }

    fn chain(&self, vertex: Option<VertexId>) -> Result<Chain, Failed> {
        match vertex.map(|v| self.nodes[v].solved.get()) {
            None => Ok(vec![]),
            Some(Some(record)) => Ok(record.chain.clone()),
            Some(None) => Err(Failed),
        }
    }

    fn solve_one(&self, vertex: VertexId) -> Result<Arc<Record>, Failed> {
        let op = self.op(vertex);
        let definition = *self.nodes[vertex].definition.get().ok_or(Failed)?;
        if let Some(record) = self.hit(vertex) {
            self.announce_cached(vertex);
            return Ok(Arc::new(record.clone()));
        }
        match op {
            Op::Image(image) => {
                let began = Instant::now();
                self.announce_start(vertex);
                let chain = vec![Arc::new(Link::Image { manifest: image.manifest, reference: image.reference.clone() })];
                return self.announce_end(vertex, began, Ok(Arc::new(Record { key: definition, chain })));
            }
            Op::Local { .. } | Op::Git(_) | Op::Http(_) => return Ok(Arc::new(Record { key: definition, chain: vec![] })),
            Op::Merge { base, layer } => {
                let mut chain = self.chain(*base)?;
                chain.extend(self.chain(Some(*layer))?);
                return Ok(Arc::new(Record { key: self.content_key(vertex, op)?, chain }));
            }
            Op::Exec(_) | Op::File(_) => {}
        }
        let key = self.content_key(vertex, op)?;
        if !self.fresh[vertex]
            && let Some(record) = self.find(&key)
        {
            cache::save(self.session.state, &[definition], &record).map_err(|error| self.fail(error.into()))?;
            self.announce_cached(vertex);
            return Ok(Arc::new(record));
        }
        let _slot = self.session.slots.take();
        self.session.check_stop().map_err(|error| self.fail(error))?;
        let began = Instant::now();
        self.announce_start(vertex);
        self.explain(vertex);
        let outcome = self.run(vertex, op).and_then(|link| {
            let mut chain = self.chain(op.base()).map_err(|Failed| BuildError::Cancelled)?;
            chain.push(Arc::new(link));
            if !self.session.is_settled() {
                // A key that nothing else has, so that what follows finds nothing either.
                return Ok(Arc::new(Record { key: CacheKey::of_content(Digest::of(format!("{chain:?}").as_bytes())), chain }));
            }
            let record = Record { key, chain };
            cache::save(self.session.state, &[key, definition], &record)?;
            Ok(Arc::new(record))
        });
        self.session.slots.ran.fetch_add(1, Ordering::Relaxed);
        self.announce_end(vertex, began, outcome)
    }

    fn run(&self, vertex: VertexId, op: &Op) -> Result<Link, BuildError> {
        let base = self.chain(op.base()).map_err(|Failed| BuildError::Cancelled)?;
        match op {
            Op::Exec(exec_op) => {
                let mounts = |from: VertexId, source: &str| match self.op(from) {
                    Op::Local { name } => self.local_chain(vertex, from, name, source),
                    _ => self.chain(Some(from)).map_err(|Failed| BuildError::Cancelled),
                };
                exec::run(self.session, &self.step(vertex), exec_op, &base, &mounts).map(Link::new_diff)
            }
            Op::File(file_op) => {
                // Times that are set while packing are for who asks for them only.
                let input = self.session.input;
                let gate = self.gate.filter(|_| self.unread[vertex] && input.source_date_epoch.is_none() && !input.files_wanted);
                let written = self.write_files(vertex, file_op, &base, gate)?;
                for action in &file_op.actions {
                    if let FileAction::Copy(copy) = action
                        && let Op::Local { name } = self.op(copy.from)
                    {
                        self.look_again(vertex, &Reads::Copy(name, copy));
                    }
                }
                Ok(written)
            }
            _ => Err(BuildError::Cancelled),
        }
    }

    /// Writes what an operation says above `base`. With `gate`, a large layer may be packed at once instead of becoming a folder.
    fn write_files(&self, vertex: VertexId, op: &FileOp, base: &[Arc<Link>], gate: Option<&Gate>) -> Result<Link, BuildError> {
        let base = image::snapshot(self.session, base)?;
        let work = self.session.state.work_dir()?;
        let out = work.subdir("fs")?;
        let source = |from: VertexId| self.tree(from).map_err(std::io::Error::other);
        let mut lent = vec![];
        let owners = file::apply(op, &base, &source, &out, self.session.state.ownership(), gate.is_some().then_some(&mut lent))
            .map_err(|error| self.file_error(vertex, error))?;
        if let Some(gate) = gate.filter(|_| lent.iter().map(Lent::size).sum::<u64>() >= WORTH_LENDING) {
            match assemble::pack_now(self.session, gate, &out, &owners, &lent) {
                // A file became longer or shorter: as it is when it is copied, then.
                Err(BuildError::Layer { source: LayerError::Io { .. }, .. }) => {}
                packed => {
                    let layer = packed?;
                    self.session.imports.borrowed().met(&layer.digest);
                    return Ok(Link::Shared(layer));
                }
            }
        }
        lent.into_iter().try_for_each(Lent::settle).map_err(|error| self.file_error(vertex, FileError::io("copy into", &out)(error)))?;
        Ok(Link::new_diff(self.session.state.commit(work, None, &owners)?))
    }

    fn announce_start(&self, vertex: VertexId) {
        if !self.nodes[vertex].announced.swap(true, Ordering::Relaxed) {
            let step = self.step(vertex);
            self.session.sink.emit(Event::Started { vertex: step.index, line: step.line(), name: step.name });
        }
    }

    fn announce_end(&self, vertex: VertexId, began: Instant, outcome: Result<Arc<Record>, BuildError>) -> Result<Arc<Record>, Failed> {
        let index = self.offset + vertex;
        match outcome {
            Ok(record) => {
                let _ = self.nodes[vertex].outcome.set(Outcome::Ran);
                self.session.sink.emit(Event::Finished { vertex: index, took: began.elapsed() });
                Ok(record)
            }
            Err(error) => {
                let _ = self.nodes[vertex].outcome.set(Outcome::Failed);
                self.session.sink.emit(Event::Failed { vertex: index, error: error.to_string() });
                Err(self.fail(error))
            }
        }
    }

    /// Says that a vertex and all it is made of came from the cache, in the order of the Dockerfile.
    fn announce_cached(&self, vertex: VertexId) {
        let mut reached = vec![false; vertex + 1];
        reached[vertex] = true;
        // Inputs have lower numbers, so one pass downwards reaches all.
        for id in (0..=vertex).rev() {
            if reached[id] {
                for input in self.op(id).inputs() {
                    reached[input] |= self.nodes[input].solved.get().is_none();
                }
            }
        }
        for vertex in (0..=vertex).filter(|id| reached[*id]) {
            let hidden = matches!(self.op(vertex), Op::Local { .. } | Op::Merge { .. });
            if hidden || self.nodes[vertex].announced.swap(true, Ordering::Relaxed) {
                continue;
            }
            if matches!(self.op(vertex), Op::Exec(_) | Op::File(_)) {
                self.session.slots.cached.fetch_add(1, Ordering::Relaxed);
            }
            let _ = self.nodes[vertex].outcome.set(Outcome::Cached);
            let step = self.step(vertex);
            self.session.sink.emit(Event::Cached { vertex: step.index, name: step.name });
        }
    }
}
