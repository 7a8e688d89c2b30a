{{- define "anychip.name" -}}
{{- if contains "anychip" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-anychip{{ end }}
{{- end }}

{{- define "anychip.selector" -}}
app.kubernetes.io/name: anychip
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "anychip.labels" -}}
{{ include "anychip.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What the device plugin of Kubernetes calls the plugin's devices; nothing for the host's own cores. */}}
{{- define "anychip.deviceResource" -}}
{{- $usual := dict "cuda" "nvidia.com/gpu" "rocm" "amd.com/gpu" "tpu" "google.com/tpu" "ascend" "huawei.com/Ascend910" -}}
{{- .Values.device.resource | default (get $usual .Values.device.plugin) -}}
{{- end }}

{{- define "anychip.scheme" -}}
{{- if .Values.tls.secretName }}HTTPS{{ else }}HTTP{{ end -}}
{{- end }}
