//! The graph while it grows: equal operations become one vertex, and in the end only what the target needs remains.

use std::collections::HashMap;

use ovenbird_oci::Digest;

use crate::plan::{ExecMountKind, FileAction, Op, Vertex, VertexId};

/// Vertices in topological order.
#[derive(Debug, Default)]
pub(super) struct Vertices {
    list: Vec<Vertex>,
    by_op: HashMap<Digest, VertexId>,
}

impl Vertices {
    /// The vertex that does `op`, a new one or the one that does the same already.
    pub(super) fn add(&mut self, op: Op, name: String, lines: Option<(u32, u32)>, no_cache: bool) -> VertexId {
        let key = identity(&op);
        if let Some(&id) = self.by_op.get(&key) {
            self.list[id].no_cache |= no_cache;
            return id;
        }
        let id = self.list.len();
        self.by_op.insert(key, id);
        self.list.push(Vertex { op, name, lines, no_cache });
        id
    }

    pub(super) fn op(&self, id: VertexId) -> &Op {
        &self.list[id].op
    }

    /// What `root` reaches, renumbered, and the new number of `root`.
    pub(super) fn prune(self, root: Option<VertexId>) -> (Vec<Vertex>, Option<VertexId>) {
        let mut needed = vec![false; self.list.len()];
        if let Some(root) = root {
            needed[root] = true;
        }
        // Inputs have lower numbers, so one pass from the end sees every vertex after all its users.
        for id in (0..self.list.len()).rev() {
            if needed[id] {
                for input in self.list[id].op.inputs() {
                    needed[input] = true;
                }
            }
        }
        let mut numbers = vec![0; self.list.len()];
        let mut kept = Vec::new();
        for (id, mut vertex) in self.list.into_iter().enumerate() {
            if needed[id] {
                renumber(&mut vertex.op, &numbers);
                numbers[id] = kept.len();
                kept.push(vertex);
            }
        }
        let root = root.map(|root| numbers[root]);
        (kept, root)
    }
}

/// Equal for operations that do the same to the same inputs. The serialised form does not do: it is the cache key, which
/// leaves out the numbers of the inputs. The debug form has every field.
fn identity(op: &Op) -> Digest {
    match op {
        // One manifest under two names is one image.
        Op::Image(image) => image.manifest,
        op => Digest::of(format!("{op:?}").as_bytes()),
    }
}

fn renumber(op: &mut Op, numbers: &[VertexId]) {
    let optional = |id: &mut Option<VertexId>| {
        if let Some(id) = id {
            *id = numbers[*id];
        }
    };
    match op {
        Op::Image(_) | Op::Local { .. } | Op::Git(_) | Op::Http(_) => {}
        Op::Exec(exec) => {
            optional(&mut exec.base);
            for mount in &mut exec.mounts {
                if let ExecMountKind::Bind { from, .. } | ExecMountKind::Cache { from, .. } = &mut mount.kind {
                    optional(from);
                }
            }
        }
        Op::File(file) => {
            optional(&mut file.base);
            for action in &mut file.actions {
                if let FileAction::Copy(copy) = action {
                    copy.from = numbers[copy.from];
                }
            }
        }
        Op::Merge { base, layer } => {
            optional(base);
            *layer = numbers[*layer];
        }
    }
}
