//! The differences between the official worker and ours that are meant, each with what either does and why ours is right.

use crate::compare::Difference;

/// A difference that is meant.
pub(crate) struct Class {
    pub(crate) name: &'static str,
    /// What the official worker does.
    pub(crate) official: &'static str,
    /// What ours does.
    pub(crate) ours: &'static str,
    /// Why ours is right.
    pub(crate) why: &'static str,
    /// Whether both do exactly that.
    pub(crate) fits: fn(&Difference) -> bool,
}

/// At most fifteen: whoever adds one has to say what it is for.
pub(crate) const CLASSES: &[Class] = &[];
