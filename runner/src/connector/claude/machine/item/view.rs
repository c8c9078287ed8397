//! A work item as people see it.

use super::{Item, Stage};
use crate::connector::claude::board::ItemView;
use crate::connector::claude::machine::Machine;

impl Machine {
    /// The work items that are here.
    pub(in crate::connector::claude) fn views(&self) -> Vec<ItemView> {
        self.items.iter().map(|(work_id, item)| item.view(work_id)).collect()
    }

    /// Calls whose results the server does not have; `None` while it is not known what an earlier runner has left.
    pub(in crate::connector::claude) fn owed(&self) -> Option<usize> {
        self.restored.then_some(self.calls.len())
    }
}

impl Item {
    fn view(&self, work_id: &str) -> ItemView {
        let stage = match self.stage {
            Stage::Acking { .. } => "acknowledging",
            Stage::Serving if self.lease.is_held() => "serving",
            Stage::Serving => "claimed",
            Stage::Ending { .. } => "ending",
            Stage::Stopping { .. } => "stopping",
        };
        ItemView {
            work_id: work_id.to_owned(),
            session_id: self.session_id.clone(),
            core: self.core.as_ref().map(ToString::to_string).unwrap_or_default(),
            stage,
            lease_until: self.lease.until(),
        }
    }
}
