//! What a migration's lanes are protected by, as the parameters say.

use std::path::Path;

use switchover_hybrid::security::{Security, TlsSettings};
use switchover_wire::tls::{Credentials, CredentialsError, Role};

use super::parameters::Parameters;

/// The protection of a migration in which this machine has that role. Certificates and keys are read now: a migration that begins
/// later sees what was changed.
///
/// # Errors
/// When the folder of credentials does not hold what it must.
pub fn security(parameters: &Parameters, role: Role) -> Result<Security, CredentialsError> {
    let allow_plain = parameters.allow_plain;
    if parameters.tls_creds.is_empty() {
        return Ok(Security { tls: None, allow_plain });
    }
    let credentials = Credentials::load(Path::new(&parameters.tls_creds), role)?;
    let name = Some(&parameters.tls_hostname).filter(|name| !name.is_empty()).cloned();
    Ok(Security { tls: Some(TlsSettings { credentials, name }), allow_plain })
}
