{{/* The command line of a pod. Secrets are never on it: whoever may list processes would read them. */}}
{{- define "anychip.arguments" -}}
{{- $own := list "host" "port" "uds" "device" "tensor-parallel-size" "served-model-name" "drain-s" "api-key" "api-keys" "admin-key" "admin-port" "tls-cert" "tls-key" -}}
- serve
- {{ .Values.model | quote }}
- --host=0.0.0.0
- --port={{ .Values.server.port | int64 }}
- --device={{ .Values.device.plugin }}
- --drain-s={{ .Values.server.drainSeconds | int64 }}
{{- if and (ne .Values.device.plugin "tpu") (gt (int .Values.device.count) 1) }}
- --tensor-parallel-size={{ .Values.device.count | int64 }}
{{- end }}
{{- with .Values.servedModelName }}
- {{ printf "--served-model-name=%s" . | quote }}
{{- end }}
{{- if .Values.apiKeys.secretName }}
- --api-keys=/etc/anychip/keys/keys
{{- end }}
{{- if .Values.admin.secretName }}
- --admin-port={{ .Values.admin.port | int64 }}
{{- end }}
{{- if .Values.tls.secretName }}
- --tls-cert=/etc/anychip/tls/tls.crt
- --tls-key=/etc/anychip/tls/tls.key
{{- end }}
{{- range $option, $value := .Values.settings }}
{{- if has $option $own }}
{{- fail (printf "settings.%s: the chart sets --%s by a value of its own; see docs/how-to/kubernetes.md" $option $option) }}
{{- end }}
{{- if kindIs "bool" $value }}
- --{{ $option }}
{{- else if kindIs "float64" $value }}
- --{{ $option }}={{ if eq (floor $value) $value }}{{ int64 $value }}{{ else }}{{ $value }}{{ end }}
{{- else }}
- {{ printf "--%s=%s" $option (toString $value) | quote }}
{{- end }}
{{- end }}
{{- end }}
