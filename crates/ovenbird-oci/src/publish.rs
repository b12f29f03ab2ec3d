//! What is published where, and in which order names may move. Values only: [`crate::registry::Client::publish`] does it.

use serde::{Deserialize, Serialize};

use crate::Reference;

/// What kind of name a tag is. The order is the order in which tags are put: a name that many follow moves last, when all others stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TagClass {
    /// Names this one build, for ever (`1.4.2-20261121-a1b2c3`).
    Unique,
    /// Names a release (`1.4.2`).
    #[default]
    Primary,
    /// Follows what is newest (`latest`, `1`).
    Floating,
}

/// One name to publish under.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Registry, repository, and tag or digest.
    pub reference: Reference,
    /// When its tag is put.
    pub class: TagClass,
}

impl From<Reference> for Target {
    fn from(reference: Reference) -> Self {
        Self { reference, class: TagClass::default() }
    }
}
