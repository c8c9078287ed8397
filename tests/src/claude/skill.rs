//! Skills that sessions have.

use serde_json::{Value, json};

use super::error::ApiError;
use super::plane::ControlPlane;

/// One version of a skill.
#[derive(Debug, Clone)]
pub struct Skill {
    /// `skill_…`.
    pub skill_id: String,
    /// Id of the version.
    pub version_id: String,
    /// Name, from which a worker makes a directory.
    pub name: String,
    /// A zip or tar archive.
    pub archive: Vec<u8>,
}

impl ControlPlane {
    /// A version by its id, or the newest by `latest`.
    ///
    /// # Errors
    /// 404.
    pub fn skill(&self, skill_id: &str, version: &str) -> Result<&Skill, ApiError> {
        let fits = |skill: &&Skill| skill.skill_id == skill_id && (version == "latest" || skill.version_id == version);
        let missing = || ApiError::not_found(format!("version {version} of skill {skill_id} not found"));
        self.skills.iter().rfind(fits).ok_or_else(missing)
    }
}

impl Skill {
    /// The version as the API shows it.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "type": "skill_version",
            "id": self.version_id,
            "skill_id": self.skill_id,
            "name": self.name,
            "description": "a skill of a test",
            "created_at": "2026-01-01T00:00:00Z",
        })
    }
}
