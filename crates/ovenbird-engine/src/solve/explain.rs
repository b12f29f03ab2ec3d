//! What a build tells about itself: why each step ran, for [`crate::trace`].

use std::path::PathBuf;
use std::sync::PoisonError;

use ovenbird_oci::Digest;

use super::Solver;
use super::local::name_of;
use crate::event::Event;
use crate::plan::{ExecMountKind, FileAction, Op, VertexId};
use crate::trace::{self, Before, Outcome, Part, PartKind, StepTrace, Trace};

impl Solver<'_> {
    /// Is it a step that `why` tells about?
    pub(super) fn is_step(&self, vertex: VertexId) -> bool {
        matches!(self.op(vertex), Op::Exec(_) | Op::File(_))
    }

    /// Says why a step runs.
    pub(super) fn explain(&self, vertex: VertexId) {
        if !self.is_step(vertex) {
            return;
        }
        let causes = self.causes(vertex);
        self.session.sink.emit(Event::Explained { vertex: self.offset + vertex, causes: causes.clone() });
        let _ = self.nodes[vertex].causes.set(causes);
    }

    pub(super) fn causes(&self, vertex: VertexId) -> Vec<String> {
        if self.plan.vertices[vertex].no_cache {
            return vec!["the cache was not to be used (--no-cache)".into()];
        }
        let before = self.before.get_or_init(|| {
            let names = (0..self.nodes.len()).filter(|v| self.is_step(*v)).map(|v| (v, self.plan.vertices[v].name.clone()));
            Before::new(trace::load(self.session.state, &self.trace_name()), &names.collect::<Vec<_>>())
        });
        before.causes(vertex, &self.parts(vertex), &|old, new| {
            let contents = self.nodes[vertex].contents.lock().unwrap_or_else(PoisonError::into_inner);
            match (trace::files::load(self.session.state, &old.value), contents.get(&new.name)) {
                (Some(old), Some(new)) => trace::files::differences(&old, &new.listing),
                _ => vec![],
            }
        })
    }

    /// Builds of the same Dockerfile, target and platform on the same context are compared.
    fn trace_name(&self) -> Digest {
        let input = self.session.input;
        let context = match &input.origin {
            Some(origin) => Some(PathBuf::from(origin)),
            None => input.contexts.get("context").map(|context| context.dir.clone()),
        };
        let target = input.options.first().and_then(|options| options.target.as_deref());
        Digest::of(format!("{context:?} {} {target:?} {}", input.dockerfile_name, self.plan.platform).as_bytes())
    }

    /// What the definition key of a step was made of.
    fn parts(&self, vertex: VertexId) -> Vec<Part> {
        let op = self.op(vertex);
        let mut parts = trace::own_parts(op, &self.plan.platform);
        let keys = self.nodes[vertex].inputs.get().map_or(&[][..], Vec::as_slice);
        let mut keys = keys.iter().copied();
        let base = keys.next().flatten();
        match op.base().map(|base| (base, self.op(base))) {
            Some((_, Op::Image(image))) => {
                let shown = format!("{}@{}", image.reference.familiar(), image.manifest.short());
                parts.push(Part::input(PartKind::Image, "", base, shown));
            }
            Some((base_vertex, _)) => parts.push(Part::input(PartKind::Parent, "", base, self.plan.vertices[base_vertex].name.clone())),
            None => {}
        }
        let mut source = |at: usize, from: Option<VertexId>, path: &str| {
            let key = keys.next().flatten();
            match from.map(|from| (from, self.op(from))) {
                Some((_, Op::Local { name })) => {
                    parts.push(Part::input(PartKind::Files, &name_of(name, path), key, String::new()));
                }
                Some((from, _)) => {
                    parts.push(Part::input(PartKind::Source, &at.to_string(), key, self.plan.vertices[from].name.clone()));
                }
                None => {}
            }
        };
        match op {
            Op::File(file) => {
                for (at, action) in file.actions.iter().enumerate() {
                    if let FileAction::Copy(copy) = action {
                        source(at, Some(copy.from), &copy.sources.join(" "));
                    }
                }
            }
            Op::Exec(exec) => {
                for (at, mount) in exec.mounts.iter().enumerate() {
                    let path = match &mount.kind {
                        ExecMountKind::Bind { source, .. } | ExecMountKind::Cache { source, .. } => source,
                        _ => "",
                    };
                    source(at, mount.kind.from(), path);
                }
            }
            _ => {}
        }
        parts
    }

    /// Keeps the trace and what it names for the next build. Losing them loses an explanation, nothing else.
    pub(super) fn remember(&self) {
        let state = self.session.state;
        for node in &self.nodes {
            if matches!(node.outcome.get(), Some(Outcome::Ran | Outcome::Failed)) {
                for contents in node.contents.lock().unwrap_or_else(PoisonError::into_inner).values() {
                    let _ = trace::files::save(state, &contents.digest, &contents.listing);
                }
            }
        }
        let _ = trace::save(state, &self.trace_name(), &self.trace());
    }

    /// What became of every step.
    pub(super) fn trace(&self) -> Trace {
        let steps = (0..self.nodes.len()).filter(|vertex| self.is_step(*vertex)).map(|vertex| {
            let node = &self.nodes[vertex];
            let step = self.step(vertex);
            StepTrace {
                line: step.line(),
                name: step.name,
                outcome: node.outcome.get().copied().unwrap_or(Outcome::NotReached),
                causes: node.causes.get().cloned().unwrap_or_default(),
                parts: self.parts(vertex),
            }
        });
        let title = format!("{} for {}", self.session.input.dockerfile_name, self.plan.platform);
        Trace { title, steps: steps.collect() }
    }
}
