//! The next certificate for the identity there is, asked for with the present one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proto::runner::v1 as pb;

use super::answer::Answer;
use super::store::{Store, about};
use super::{EnrollError, in_time, new_key, refused, service, signing_request};
use crate::connector::backoff::draw;
use crate::connector::dial::{Proxy, Target};
use crate::connector::tls::Credentials;

/// Where the identity is that the daemon renews by itself.
#[derive(Debug, Clone)]
pub struct Renewal {
    /// Directory of the identity.
    pub directory: PathBuf,
    /// Proxy on the way to the service.
    pub proxy: Option<Proxy>,
}

impl Renewal {
    /// Seconds since 1970 at which to renew `credentials`: when the service says so, else after half of their life, with a
    /// tenth to both sides, so that runners that were enrolled together are not renewed together.
    #[must_use]
    pub fn due(&self, credentials: &Credentials) -> i64 {
        let said = about(&self.directory).ok().flatten().and_then(|about| about.renew_after);
        // A time behind the end is no time to renew.
        let said = said.filter(|time| *time < credentials.not_after);
        said.unwrap_or_else(|| half_of_life(credentials.not_before, credentials.not_after, draw()))
    }

    /// Asks for a new certificate, with a new key, and puts it into use on the disk.
    ///
    /// # Errors
    /// `EnrollError`; the present identity stays as it is.
    pub async fn renew(&self, present: &Credentials) -> Result<(), EnrollError> {
        let store = Store::open(&self.directory)?;
        let about = about(&self.directory)?
            .ok_or_else(|| EnrollError::Answer { problem: "there is no identity to renew".to_owned() })?;
        let target = Target {
            host: about.host.clone(),
            port: about.port,
            server_name: about.server_name.clone(),
            proxy: self.proxy.clone(),
        };
        let key = new_key(&self.directory)?;
        let message = pb::RenewRequest { csr_der: signing_request(&key, &self.directory)? };
        let answer = in_time(&target, async {
            let mut service = service(&target, Arc::clone(&present.config)).await?;
            Ok(service.renew(message).await.map_err(|status| refused(&status))?.into_inner())
        })
        .await?;
        let answer = Answer {
            runner_id: about.runner_id,
            chain: answer.chain_der,
            bundle: answer.trust_bundle_der,
            endpoints: about.endpoints,
            renew_after: answer.renew_after,
        };
        let name = present.names.first().map(String::as_str);
        write(&store, &answer.into_set(&key.serialize_pem(), name, &target, &self.directory, SystemTime::now())?)
    }
}

fn write(store: &Store, set: &super::store::Set) -> Result<(), EnrollError> {
    let name = store.write(set)?;
    store.switch(&name)?;
    Ok(store.clean()?)
}

/// After 40 to 60 of 100 parts; `drawn` is between 0 and 1.
fn half_of_life(not_before: i64, not_after: i64, drawn: f64) -> i64 {
    let life = Duration::from_secs(u64::try_from(not_after.saturating_sub(not_before)).unwrap_or(0));
    let after = life.mul_f64(0.4 + 0.2 * drawn.clamp(0.0, 1.0));
    not_before.saturating_add(i64::try_from(after.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_around_half_of_life_and_not_for_everybody_at_once() {
        for (drawn, expected) in [(0.0, 1400), (0.5, 1500), (1.0, 1600), (7.0, 1600)] {
            assert_eq!(half_of_life(1000, 2000, drawn), expected);
        }
        assert_eq!(half_of_life(1000, 900, 1.0), 1000);
    }
}
