//! The files that a configuration names: whether they can be read, and whether those of the link belong together.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::config::file::{ClaudeSection, ConfigFile, OrchestratorSection};
use crate::config::problem::Problem;
use crate::connector::tls::{TlsError, TlsFiles, TlsSource};

/// Key files and authorities of the work queues that cannot be read. `credentials` is where the service manager has put its own.
pub(super) fn of_queues(path: &Path, file: &ConfigFile, credentials: Option<&Path>) -> Vec<Problem> {
    let files = file.claude.iter().enumerate().flat_map(|(number, section)| {
        let key = move |name: &str| format!("claude[{number}].{name}");
        let given = [
            ("key_file", section.key_file.clone()),
            ("key_credential", credential(section, credentials)),
            ("ca_file", section.ca_file.clone()),
        ];
        given.into_iter().filter_map(move |(name, file)| Some((key(name), file?)))
    });
    files.filter_map(|(key, file)| unreadable(path, key, &file)).collect()
}

fn credential(section: &ClaudeSection, directory: Option<&Path>) -> Option<PathBuf> {
    Some(directory?.join(section.key_credential.as_deref()?))
}

/// What a runner would say of the certificates that somebody else keeps.
pub(super) fn of_link(path: &Path, file: &ConfigFile) -> Vec<Problem> {
    let Some(section) = &file.orchestrator else { return Vec::new() };
    let given = [
        ("ca_file", &section.ca_file),
        ("certificate_file", &section.certificate_file),
        ("key_file", &section.key_file),
    ];
    let given = given.into_iter().filter_map(|(name, file)| Some((format!("orchestrator.{name}"), file.as_deref()?)));
    let problems: Vec<_> = given.filter_map(|(key, file)| unreadable(path, key, file)).collect();
    match tls_files(section) {
        Some(files) if problems.is_empty() => unfit(path, files, file.runner.id.as_deref()).into_iter().collect(),
        _ => problems,
    }
}

fn tls_files(section: &OrchestratorSection) -> Option<TlsFiles> {
    Some(TlsFiles {
        authorities: section.ca_file.clone()?,
        certificate: section.certificate_file.clone()?,
        key: section.key_file.clone()?,
    })
}

fn unreadable(path: &Path, key: String, file: &Path) -> Option<Problem> {
    // A relative one is refused as that.
    let error = file.is_absolute().then(|| fs::File::open(file).err()).flatten()?;
    Some(Problem {
        file: path.to_path_buf(),
        key,
        what: format!("{} cannot be read: {error}", file.display()),
        fix: "create the file, or let the runner's user read it".to_owned(),
    })
}

fn unfit(path: &Path, files: TlsFiles, runner_id: Option<&str>) -> Option<Problem> {
    let loaded = TlsSource::load(files, SystemTime::now());
    let error = loaded.and_then(|source| match runner_id {
        Some(runner_id) => source.check_runner(runner_id),
        None => source.runner_id().map(drop),
    });
    let error = error.err()?;
    let (name, fix) = match &error {
        TlsError::Read { what, .. } | TlsError::Content { what, .. } => {
            let name = match *what {
                "authorities" => "ca_file",
                "private key" => "key_file",
                _ => "certificate_file",
            };
            (name, "put a PEM file there that the runner's user can read")
        }
        TlsError::Mismatch { .. } => ("key_file", "put the key there that the certificate was made for"),
        TlsError::Time { .. } => ("certificate_file", "renew it, or set the clock of this machine"),
        TlsError::Runner { fix, .. } => ("certificate_file", fix.as_str()),
        TlsError::Identity { .. } => ("certificate_file", "put the certificate of this runner there"),
    };
    let what = match &error {
        TlsError::Runner { path, problem, .. } => format!("certificate {} {problem}", path.display()),
        other => other.to_string(),
    };
    Some(Problem { file: path.to_path_buf(), key: format!("orchestrator.{name}"), what, fix: fix.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dev::pki::{Authority, Validity};

    /// What is said of the files that `spoil` has had its way with, of a runner with this name.
    fn said_of(runner_id: Option<&str>, spoil: impl FnOnce(&Authority, &TlsFiles)) -> Vec<String> {
        let directory = tempfile::tempdir().expect("temporary directory");
        let authority = Authority::new("ours").expect("an authority");
        let client = authority.client("runner-1", Validity::Now).expect("a certificate");
        let files = authority.write_client_files(directory.path(), &client).expect("files");
        spoil(&authority, &files);
        let id = runner_id.map_or(String::new(), |id| format!("[runner]\nid = \"{id}\"\n"));
        let text = format!(
            "{id}[orchestrator]\nendpoint = \"https://o\"\nca_file = {:?}\ncertificate_file = {:?}\nkey_file = {:?}\n",
            files.authorities, files.certificate, files.key
        );
        let file = ConfigFile::parse(Path::new("c.toml"), &text).expect("good");
        of_link(Path::new("c.toml"), &file).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn certificates_of_this_runner_are_no_problem_with_and_without_its_name_in_the_file() {
        assert_eq!(said_of(Some("runner-1"), |_, _| {}), Vec::<String>::new());
        assert_eq!(said_of(None, |_, _| {}), Vec::<String>::new());
    }

    #[test]
    fn certificates_that_a_runner_would_refuse_are_named_with_their_key_and_the_fix() {
        let put = |path: &Path, text: &str| fs::write(path, text).expect("written");
        let expired = said_of(None, |authority, files| {
            let client = authority.client("runner-1", Validity::Expired).expect("a certificate");
            put(&files.certificate, &client.certificate_pem);
            put(&files.key, &client.key_pem);
        });
        let mismatch = said_of(None, |authority, files| {
            let other = authority.client("runner-1", Validity::Now).expect("a certificate");
            put(&files.key, &other.key_pem);
        });
        let other = said_of(Some("runner-2"), |_, _| {});
        let nobody = said_of(None, |authority, files| {
            let client = authority.nameless().expect("a certificate");
            put(&files.certificate, &client.certificate_pem);
            put(&files.key, &client.key_pem);
        });
        let empty = said_of(None, |_, files| put(&files.authorities, ""));
        let cases = [
            (expired, "orchestrator.certificate_file: ", "is expired since", "renew it"),
            (mismatch, "orchestrator.key_file: ", "does not belong to certificate", "put the key there"),
            (
                other,
                "orchestrator.certificate_file: ",
                "names runner runner-1, and runner.id is runner-2",
                "write id = \"runner-1\"",
            ),
            (
                nobody,
                "orchestrator.certificate_file: ",
                "has no subject alternative name",
                "get one whose name ends in /RUNNER-ID",
            ),
            (empty, "orchestrator.ca_file: ", "holds no certificate", "put a PEM file there"),
        ];
        for (said, key, what, fix) in cases {
            assert_eq!(said.len(), 1, "{said:?}");
            assert!([key, what, fix].iter().all(|part| said[0].contains(part)), "{said:?}");
        }
    }

    #[test]
    fn all_that_cannot_be_read_is_named_at_once() {
        let said = said_of(None, |_, files| {
            fs::remove_file(&files.authorities).expect("removed");
            fs::remove_file(&files.key).expect("removed");
        });
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("orchestrator.ca_file: ") && said[1].contains("key.pem cannot be read"), "{said:?}");
    }
}
